"""Rows F10, F11 and F15: a signal, an error or the death of one rank ends all of them, and soon."""

import multiprocessing
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.engine.ranks_run import Fault, launch_train, train, train_as_rank
from trainkit.engine import processes
from trainkit.engine.failures import RankDiedError
from trainkit.engine.launch import launch

pytestmark = pytest.mark.faults

LIMIT_SECONDS = 10.0


@pytest.fixture(autouse=True)
def _preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts processes that have imported everything, where `launch` takes new ones."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(processes, "START_METHOD", "forkserver")
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["tests.engine.ranks_run", "torch._dynamo"]
    )


def start(target: Any, *args: Any) -> BaseProcess:
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int:
    process.join(60)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the run hangs")
    return process.exitcode


def seconds_since_the_fault(folder: Path) -> float:
    return time.time() - float((folder / "struck").read_text())


def running(folder: Path) -> Iterator[int]:
    """Yields the ranks that are still there."""
    for path in folder.glob("pid-*"):
        stat = Path("/proc", path.read_text(), "stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
            yield int(path.name.removeprefix("pid-"))


def assert_saved_where_all_stopped(folder: Path, count: int) -> None:
    stops = [int((folder / f"iter-{rank}").read_text()) for rank in range(count)]
    assert len(set(stops)) == 1
    assert 5 < stops[0] < 1000
    newest = max(path.name for path in folder.glob("*.pth"))
    assert newest == f"model_{stops[0] - 1:07d}.pth"


PLACES = {
    ("data", 5): "iteration 5 on rank 1, fetching a batch",
    ("forward", 5): "iteration 5 on rank 1, in the forward or backward pass",
    ("before_train", 0): "iteration 0 on rank 1, in the hook StrikingHook.before_train",
    ("after_step", 5): "iteration 5 on rank 1, in the hook StrikingHook.after_step",
    ("state_dict", 7): "iteration 7 on rank 1, in the hook StrikingHook.state_dict",
    ("evaluation", 7): "iteration 7 on rank 1, in evaluation",
    ("building", -1): "Failed on rank 1, outside of training",
}


def assert_names_the_first_error(folder: Path, fault: Fault, count: int, note: str) -> None:
    with pytest.raises(ValueError, match="of rank 1") as raised:
        launch(train, count, args=(folder, fault))
    assert seconds_since_the_fault(folder) < LIMIT_SECONDS
    assert raised.value.__notes__[0].endswith(f"{note}.")
    assert 'raise ValueError(f"of rank {fault.rank}")' in str(raised.value.__cause__)
    assert list(running(folder)) == []


@pytest.mark.parametrize(("place", "iteration"), PLACES)
def test_f15_an_error_of_one_of_two_ranks_ends_both_and_is_the_one_that_is_raised(
    tmp_path: Path, place: str, iteration: int
) -> None:
    fault = Fault(place, iteration, num_workers=1 if place == "data" else 0)
    assert_names_the_first_error(tmp_path, fault, 2, PLACES[place, iteration])


@pytest.mark.parametrize(("place", "iteration"), [("forward", 5), ("state_dict", 7)])
def test_f15_an_error_of_one_of_three_ranks_ends_all_three(
    tmp_path: Path, place: str, iteration: int
) -> None:
    fault = Fault(place, iteration)
    assert_names_the_first_error(tmp_path, fault, 3, PLACES[place, iteration])


def test_f15_ranks_that_hang_are_killed_when_another_one_fails(tmp_path: Path) -> None:
    # As in a collective of NCCL, which no dead peer ends.
    fault = Fault("before_step", 5, others_hang=True)
    note = "iteration 5 on rank 1, in the hook StrikingHook.before_step"
    assert_names_the_first_error(tmp_path, fault, 2, note)


def test_f15_a_killed_rank_is_named_and_ends_the_other(tmp_path: Path) -> None:
    fault = Fault("forward", 5, signal.SIGKILL)
    with pytest.raises(
        RankDiedError, match=r"^Rank 1 \(pid \d+\) was killed by SIGKILL; .*--resum"
    ):
        launch(train, 2, args=(tmp_path, fault))
    assert seconds_since_the_fault(tmp_path) < LIMIT_SECONDS
    assert list(running(tmp_path)) == []


def test_f15_ranks_save_and_leave_when_their_launcher_is_killed(tmp_path: Path) -> None:
    fault = Fault("after_step", 5, signal.SIGKILL, "launcher")
    assert exit_code(start(launch_train, tmp_path, fault, 2)) == -signal.SIGKILL
    while list(running(tmp_path)):
        assert seconds_since_the_fault(tmp_path) < 3 * LIMIT_SECONDS
        time.sleep(0.1)
    assert_saved_where_all_stopped(tmp_path, 2)


def test_f10_sigterm_to_one_of_three_ranks_saves_one_step_on_all_and_each_exits_with_143(
    tmp_path: Path,
) -> None:
    fault = Fault("after_step", 5, signal.SIGTERM)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [start(train_as_rank, tmp_path, fault, rank, 3, port) for rank in range(3)]
    assert [exit_code(rank) for rank in ranks] == [143, 143, 143]
    assert seconds_since_the_fault(tmp_path) < LIMIT_SECONDS
    assert_saved_where_all_stopped(tmp_path, 3)


@pytest.mark.parametrize(
    ("signum", "receiver", "num_workers", "code"),
    [
        pytest.param(signal.SIGTERM, "rank", 0, 143, id="f10-rank"),
        pytest.param(signal.SIGTERM, "group", 1, 143, id="f11-group"),
        pytest.param(signal.SIGUSR1, "launcher", 0, 138, id="f13-launcher"),
    ],
)
def test_f10_f11_the_launcher_leaves_with_its_ranks_code_once_they_have_saved(
    tmp_path: Path, signum: int, receiver: str, num_workers: int, code: int
) -> None:
    fault = Fault("before_step", 5, signum, receiver, num_workers=num_workers)
    assert exit_code(start(launch_train, tmp_path, fault, 2)) == code
    assert seconds_since_the_fault(tmp_path) < LIMIT_SECONDS
    assert_saved_where_all_stopped(tmp_path, 2)
    assert list(running(tmp_path)) == []


def test_f12_a_second_signal_to_the_launcher_kills_ranks_that_hang(tmp_path: Path) -> None:
    # Of two Ctrl-C they would take none: they exit by themselves only at a second SIGTERM.
    fault = Fault("before_step", 5, signal.SIGINT, "launcher twice", others_hang=True)
    assert exit_code(start(launch_train, tmp_path, fault, 2)) == 130
    assert seconds_since_the_fault(tmp_path) < LIMIT_SECONDS
    assert list(running(tmp_path)) == []
