"""F21: a folder has one run at a time, and a dead run's lock is no obstacle."""

import errno
import json
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import multiprocessing as mp
from torch.multiprocessing.spawn import start_processes

from tests.checkpoint.held_folder import hold, rank_errors
from trainkit.checkpoint import lock
from trainkit.checkpoint.lock import LOCK, check_not_held, hold_run_folder
from trainkit.utils.errors import ConfigError


@contextmanager
def other_run(folder: Path, num_workers: int = 0) -> Iterator[tuple[Any, Connection, Any]]:
    """Starts a process that tries to hold a folder; gives it, and what it says of that."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.held_folder"])
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(folder, there, num_workers))
    process.start()
    try:
        assert here.poll(60), "the other run says nothing"
        yield process, here, here.recv()
    finally:
        process.kill()
        process.join()


def refusal(folder: Path) -> str:
    """Returns what a run of this process is told."""
    with pytest.raises(ConfigError) as raised, hold_run_folder(folder):
        pass
    return str(raised.value)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.faults
def test_f21_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with other_run(tmp_path) as (process, connection, _):
        for _ in range(2):
            text = refusal(tmp_path)
            start = f"OUTPUT_DIR '{tmp_path}' is in use by process {process.pid} on "
            assert text.startswith(f"{start}{socket.gethostname()}, started ")
            assert re.search(r", started \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S+\. Two runs would", text)
            assert text.endswith("for that one's end, stop it, or set another OUTPUT_DIR.")
            with pytest.raises(ConfigError) as raised:
                check_not_held(tmp_path)
            assert str(raised.value) == text
        connection.send("leave")
        process.join(60)
        assert (tmp_path / LOCK).read_bytes() == b""
        check_not_held(tmp_path)
        with hold_run_folder(tmp_path):
            pass


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [0, 2])
def test_f21_a_killed_runs_folder_is_taken_over_even_if_its_workers_live(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    with other_run(tmp_path, num_workers) as (process, _, workers):
        assert len(workers) == num_workers
        for worker in workers:
            # Else the workers would end with their parent, sooner or later.
            os.kill(worker, signal.SIGSTOP)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        try:
            check_not_held(tmp_path)
            with caplog.at_level(logging.INFO), hold_run_folder(tmp_path):
                assert all(map(is_alive, workers))
                holder = json.loads((tmp_path / LOCK).read_text())
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
    (message,) = caplog.messages
    assert f"Taking over {tmp_path / LOCK} from process {process.pid} on " in message
    assert message.endswith(", which is gone")
    assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())


@pytest.mark.faults
def test_f21_neither_a_check_nor_a_second_trainer_here_loses_the_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with hold_run_folder(tmp_path):
        assert "in use by another trainer of this process" in refusal(tmp_path)
        with pytest.raises(ConfigError, match="another trainer of this process"):
            check_not_held(tmp_path / "link")
        with other_run(tmp_path) as (_, _, text):
            assert f"in use by process {os.getpid()} on " in text
    with other_run(tmp_path) as (_, _, text):
        assert text == []


@pytest.mark.faults
def test_f21_a_run_that_failed_gives_the_folder_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), hold_run_folder(tmp_path):
        1 / 0  # noqa: B018  # any error
    with caplog.at_level(logging.INFO), hold_run_folder(tmp_path):
        assert caplog.text == ""


@pytest.mark.slow
@pytest.mark.faults
def test_f21_all_ranks_are_refused_alike(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with hold_run_folder(tmp_path / "held"):
        start_processes(rank_errors, (tmp_path, port), nprocs=2, start_method="forkserver")
    first, second = ((tmp_path / f"{rank}.txt").read_text().split("\n") for rank in range(2))
    assert first == second
    assert f"in use by process {os.getpid()} on" in first[0]
    assert first == [first[0], first[0], "", ""]


def test_a_folder_is_made_and_a_check_writes_nothing(tmp_path: Path) -> None:
    check_not_held(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with hold_run_folder(tmp_path / "run"):
        assert os.listdir(tmp_path / "run") == [LOCK]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def failing(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    fcntl = SimpleNamespace(lockf=failing, LOCK_EX=2, LOCK_SH=1, LOCK_NB=4)
    monkeypatch.setattr(lock, "_fcntl", fcntl)
    check_not_held(tmp_path)
    with hold_run_folder(tmp_path), hold_run_folder(tmp_path):
        pass
    assert f"Cannot lock {tmp_path / LOCK} ({os.strerror(code)}): see to it" in caplog.text


def test_a_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "_fcntl", None)
    check_not_held(tmp_path)
    with hold_run_folder(tmp_path):
        assert "(this system has no record locks)" in caplog.text


def test_a_lock_that_cannot_be_opened_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / LOCK).mkdir()
    check_not_held(tmp_path)
    with hold_run_folder(tmp_path):
        assert "(Is a directory)" in caplog.text


def test_a_link_in_the_locks_place_is_not_written_through(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with hold_run_folder(tmp_path):
        assert "Cannot lock" in caplog.text
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_named_pipe_in_the_locks_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    check_not_held(tmp_path)
    with hold_run_folder(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 5000, b'{"pid": 1}', b"1"])
def test_a_lock_that_says_nothing_is_taken_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with caplog.at_level(logging.INFO), hold_run_folder(tmp_path):
        assert caplog.text == ""


@pytest.mark.faults
def test_f21_a_full_disk_costs_the_signature_and_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", failing)
    with hold_run_folder(tmp_path), other_run(tmp_path) as (_, _, text):
        assert "in use by another process. Two runs" in text
