import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.utils.events.json_writer import JSONWriter
from trainkit.utils.events.storage import EventStorage


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def records(path: Path) -> list[dict[str, Any]]:
    """The file's lines, each a strict JSON object and ended by a newline."""
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


NewWriter = Callable[..., JSONWriter]


@pytest.fixture
def new_writer() -> Iterator[NewWriter]:
    """Makes writers, and closes the files of those that a test left as a kill does."""
    writers: list[JSONWriter] = []

    def make(*args: Any, **kwargs: Any) -> JSONWriter:
        writers.append(JSONWriter(*args, **kwargs))
        return writers[-1]

    yield make
    for writer in writers:
        if writer._file is not None:
            writer._file.close()


def run(
    writer: JSONWriter, storage: EventStorage, iterations: range, save_before: int | None = None
) -> dict[str, Any]:
    """Trains: loss and lr always, top1 every 7, a write every 10.

    Returns:
        States of storage and writer inside step `save_before`, before top1 and the write, as a
        checkpoint brings them back.
    """
    saved: dict[str, Any] = {}
    with storage:
        for i in iterations:
            storage.iter = i
            storage.put_scalar("loss", math.sin(i))
            storage.put_scalar("lr", 0.1 / (i + 1), smoothing_hint=False)
            if i == save_before:
                file = io.BytesIO()
                torch.save({"storage": storage.state_dict(), "writer": writer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            if i % 7 == 6:
                storage.put_scalar("top1", i / 100, smoothing_hint=False)
            if i % 10 == 9:
                writer.write()
    return saved


def write_one(path: Path, iteration: int, values: dict[str, float], start_iter: int = 0) -> None:
    """A new writer that writes one line."""
    writer = JSONWriter(path)
    with EventStorage(start_iter) as storage:
        for name, value in values.items():
            storage.put_scalar(name, value, cur_iter=iteration)
        writer.write()
    writer.close()


def test_line_has_sorted_keys_and_the_iteration(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.json"
    write_one(path, 19, {"total_loss": 1.25, "lr": 0.1, "eta_seconds": 3.0})
    expected = '{"eta_seconds": 3.0, "iteration": 19, "lr": 0.1, "total_loss": 1.25}\n'
    assert path.read_text(encoding="ascii") == expected


def test_d33_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_one(path, 3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    assert records(path) == [{"iteration": 3, "a": None, "b": None, "c": None, "d": 1.0}]


def test_name_in_any_script_stays_one_ascii_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    name = "größe\n\u2028"
    write_one(path, 3, {name: 1.0})
    assert records(path) == [{"iteration": 3, name: 1.0}]


def test_sparse_values_get_their_own_lines_and_dense_ones_one_per_write(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    run(new_writer(path), EventStorage(), range(30))
    written = records(path)
    assert [r["iteration"] for r in written] == [6, 9, 13, 19, 20, 27, 29]
    assert {r["iteration"]: r["top1"] for r in written if "top1" in r} == {
        i: i / 100 for i in (6, 13, 20, 27)
    }
    assert {r["iteration"]: r["lr"] for r in written if "lr" in r} == {
        i: 0.1 / (i + 1) for i in (9, 19, 29)
    }


def test_smoothed_values_are_medians_of_the_window(new_writer: NewWriter, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    writer = new_writer(path, window_size=3)
    with EventStorage() as storage:
        for i, value in enumerate([9.0, 1.0, 5.0, 3.0]):
            storage.put_scalar("loss", value, cur_iter=i)
        writer.write()
    assert records(path) == [{"iteration": 3, "loss": 3.0}]


def test_d32_values_put_after_the_write_join_the_line_of_their_iteration(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    writer = new_writer(path)
    with EventStorage() as storage:
        for i in range(20):
            storage.iter = i
            storage.put_scalar("loss", 1.0)
            if i in (9, 19):
                writer.write()
        storage.put_scalar("top1", 0.9, smoothing_hint=False)
        writer.write()
        assert records(path)[-1] == {"iteration": 19, "loss": 1.0, "top1": 0.9}
        # And once more, now together with newer values.
        storage.put_scalar("top5", 0.99, smoothing_hint=False)
        storage.put_scalar("loss", 2.0, cur_iter=20)
        writer.write()
    assert [r["iteration"] for r in records(path)] == [9, 19, 20]
    assert records(path)[1] == {"iteration": 19, "loss": 1.0, "top1": 0.9, "top5": 0.99}


def test_values_put_late_join_their_line_after_a_resume_too(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    saved = run(new_writer(path), EventStorage(), range(14), save_before=10)
    writer, storage = new_writer(path), EventStorage(11)
    writer.load_state_dict(saved["writer"])
    storage.load_state_dict(saved["storage"])
    with storage:
        storage.put_scalar("top5", 0.99, smoothing_hint=False, cur_iter=9)
        writer.write()
    assert [r["iteration"] for r in records(path)] == [6, 9, 10]
    assert set(records(path)[1]) == {"iteration", "loss", "lr", "top5"}


def test_nothing_new_writes_nothing(new_writer: NewWriter, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    writer = new_writer(path)
    with EventStorage() as storage:
        writer.write()
        assert not path.exists()
        storage.put_scalar("loss", 1.0)
        writer.write()
        once = path.read_bytes()
        writer.write()
    assert path.read_bytes() == once


def test_writer_goes_on_after_it_was_closed(new_writer: NewWriter, tmp_path: Path) -> None:
    path, unbroken = tmp_path / "metrics.json", tmp_path / "unbroken.json"
    run(new_writer(unbroken), EventStorage(), range(30))
    writer, storage = new_writer(path), EventStorage()
    run(writer, storage, range(20))
    writer.close()
    writer.close()
    run(writer, storage, range(20, 30))
    assert path.read_bytes() == unbroken.read_bytes()


# Checkpoints are taken inside a step, before evaluation and writing.
@pytest.mark.parametrize("save", [0, 5, 6, 9, 10, 13, 19, 20, 25, 29])
@pytest.mark.parametrize("kill", [0, 3, 13])
def test_d33_resumed_file_equals_that_of_an_unbroken_run(
    new_writer: NewWriter, tmp_path: Path, save: int, kill: int
) -> None:
    path, unbroken = tmp_path / "metrics.json", tmp_path / "unbroken.json"
    run(new_writer(unbroken), EventStorage(), range(45))
    killed = new_writer(path)
    saved = run(killed, EventStorage(), range(save + kill + 1), save_before=save)
    with path.open("ab") as file:
        file.write(b'{"iteration": 4')  # Torn by the kill.

    writer, storage = new_writer(path), EventStorage(save + 1)
    writer.load_state_dict(saved["writer"])
    storage.load_state_dict(saved["storage"])
    with storage:  # The rest of the step that was cut.
        storage.iter = save
        if save % 7 == 6:
            storage.put_scalar("top1", save / 100, smoothing_hint=False)
        if save % 10 == 9:
            writer.write()
    run(writer, storage, range(save + 1, 45))
    assert path.read_bytes() == unbroken.read_bytes()


def test_state_of_a_resumed_run_before_its_first_write_is_the_loaded_one(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    saved = run(new_writer(path), EventStorage(), range(30), save_before=15)["writer"]
    writer = new_writer(path)
    writer.load_state_dict(saved)
    with EventStorage(16):
        assert writer.state_dict() == saved


def test_file_is_untouched_until_the_first_write_after_a_resume(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    saved = run(new_writer(path), EventStorage(), range(30), save_before=15)["writer"]
    before = path.read_bytes()
    writer = new_writer(path)
    writer.load_state_dict(saved)
    with EventStorage(16) as storage:
        writer.state_dict()
        writer.write()
        assert path.read_bytes() == before
        storage.put_scalar("loss", 1.0)
        writer.write()
    assert [r["iteration"] for r in records(path)] == [6, 9, 16]


def test_writer_that_has_written_can_be_taken_back(new_writer: NewWriter, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    writer = new_writer(path)
    saved = run(writer, EventStorage(), range(30), save_before=15)
    storage = EventStorage(16)
    storage.load_state_dict(saved["storage"])
    unbroken = path.read_bytes()
    writer.load_state_dict(saved["writer"])
    run(writer, storage, range(16, 30))
    assert path.read_bytes() == unbroken


def test_state_outside_of_training_is_that_of_a_run_to_come(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    state = new_writer(path).state_dict()
    assert not path.exists()
    writer = new_writer(path)
    writer.load_state_dict(state)
    run(writer, EventStorage(), range(10))
    assert [r["iteration"] for r in records(path)] == [6, 9]


def test_new_run_sets_an_old_file_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, aside = tmp_path / "metrics.json", tmp_path / "metrics.previous.json"
    write_one(path, 19, {"loss": 1.0})
    old = path.read_bytes()
    write_one(path, 9, {"loss": 2.0})
    assert records(path) == [{"iteration": 9, "loss": 2.0}]
    assert aside.read_bytes() == old
    assert f"Moving the metrics of an earlier run to {aside}" in caplog.text


def test_checkpoint_before_the_first_write_sets_an_old_file_aside(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    write_one(path, 2, {"loss": 1.0})
    writer = new_writer(path)
    saved = run(writer, EventStorage(), range(6), save_before=5)
    assert saved["writer"]["length"] == 0
    assert records(tmp_path / "metrics.previous.json") == [{"iteration": 2, "loss": 1.0}]
    writer.close()
    resumed, storage = new_writer(path), EventStorage(6)
    resumed.load_state_dict(saved["writer"])
    storage.load_state_dict(saved["storage"])
    run(resumed, storage, range(6, 10))
    assert [r["iteration"] for r in records(path)] == [6, 9]


def test_run_that_starts_later_without_a_state_drops_later_lines(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    run(new_writer(path), EventStorage(), range(30))
    earlier = records(path)[:2]
    with path.open("ab") as file:
        file.write(b'{"iteration": 3')
    write_one(path, 25, {"loss": 1.0}, start_iter=13)
    assert records(path) == [*earlier, {"iteration": 25, "loss": 1.0}]
    assert not (tmp_path / "metrics.previous.json").exists()


@pytest.mark.parametrize(
    "end",
    [
        *(
            b'{"iteration": 4}',
            b'{"iteration": 4',
            b"[4]\n",
            b"4\n",
            b"\xff\xfe\n",
            b'{"loss": 1}\n',
        ),
        *(
            b"[" * 200_000 + b"\n",
            b'{"iteration": 1' + b"0" * 5000 + b"}\n",
            b'{"iteration": 1e9}\n',
        ),
        *(b'{"iteration": NaN}\n', b'{"iteration": -Infinity}\n', b'{"iteration": "4"}\n'),
        b'{"iteration":\r4}\n',
        *('{"iteration": 4}'.encode("utf-16"), '{"iteration": 4, "ü": 1}\n'.encode()),
        b'{"iteration": 4, "x": "' + b"x" * (1 << 21) + b'"}\n',
    ],
    ids=range(16),
)
def test_line_after_a_damaged_end_is_whole(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.json"
    path.write_bytes(b'{"iteration": 3}\n' + end)
    write_one(path, 9, {"loss": 1.0}, start_iter=5)
    whole = [{"iteration": 4}] if end == b'{"iteration": 4}' else []
    assert records(path) == [{"iteration": 3}, *whole, {"iteration": 9, "loss": 1.0}]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_f23_a_link_to_another_file_is_not_written_through(
    new_writer: NewWriter, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_resumed: bool
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "run" / "metrics.json"
    path.parent.mkdir()
    saved = run(new_writer(path), EventStorage(), range(10), save_before=8)
    path.rename(victim)
    before = victim.read_bytes()
    path.symlink_to(victim)
    writer, storage = new_writer(path), EventStorage(9)
    if is_resumed:
        writer.load_state_dict(saved["writer"])
        storage.load_state_dict(saved["storage"])
    run(writer, storage, range(9, 20))
    assert victim.read_bytes() == before
    assert not path.is_symlink()
    assert records(path)[-1]["iteration"] == 19
    assert f"{path} was a link out of its folder" in caplog.text


# The first line, of iteration 6, is 30 bytes long without its newline.
@pytest.mark.parametrize(("left", "kept"), [(0, []), (29, []), (30, [6]), (31, [6]), (50, [6])])
def test_file_shorter_than_recorded_is_reported_and_stays_valid(
    new_writer: NewWriter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    left: int,
    kept: list[int],
) -> None:
    path = tmp_path / "metrics.json"
    saved = run(new_writer(path), EventStorage(), range(30), save_before=25)
    length = saved["writer"]["length"]
    path.write_bytes(path.read_bytes()[:left])
    writer = new_writer(path)
    writer.load_state_dict(saved["writer"])
    storage = EventStorage(26)
    storage.load_state_dict(saved["storage"])
    run(writer, storage, range(26, 30))
    assert f"{path} has {left} bytes but had {length} when the checkpoint was saved" in caplog.text
    # Iteration 20 had not been written at 25.
    assert [r["iteration"] for r in records(path)] == [*kept, 20, 27, 29]


def test_missing_file_is_reported_and_begun_anew(
    new_writer: NewWriter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.json"
    writer = new_writer(path)
    saved = run(writer, EventStorage(), range(20), save_before=15)
    writer.close()
    path.unlink()
    resumed, storage = new_writer(path), EventStorage(16)
    resumed.load_state_dict(saved["writer"])
    storage.load_state_dict(saved["storage"])
    run(resumed, storage, range(16, 20))
    assert "has 0 bytes but had" in caplog.text
    assert [r["iteration"] for r in records(path)] == [13, 19]


def test_closing_a_writer_that_never_wrote_creates_nothing(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    new_writer(tmp_path / "metrics.json").close()
    assert list(tmp_path.iterdir()) == []


def test_lines_reach_the_file_with_each_write(
    new_writer: NewWriter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.json"
    with caplog.at_level(logging.WARNING):
        run(new_writer(path), EventStorage(), range(10))  # Never closed, as after a kill.
    assert len(records(path)) == 2
    assert caplog.text == ""
