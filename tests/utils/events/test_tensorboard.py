import io
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage
from trainkit.utils.events.tensorboard import TensorboardXWriter

NewWriter = Callable[..., TensorboardXWriter]


@pytest.fixture
def new_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewWriter]:
    """Makes writers to `tmp_path`, and closes those that a test left as a kill does."""
    pytest.importorskip("tensorboard")
    # Event files are read in the order of their names, which hold the second of their creation.
    seconds = itertools.count(2e9)
    monkeypatch.setattr("time.time", lambda: next(seconds))
    writers: list[TensorboardXWriter] = []

    def make(**kwargs: Any) -> TensorboardXWriter:
        writers.append(TensorboardXWriter(tmp_path, **kwargs))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


def events(folder: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    guidance = {"scalars": 0, "images": 0, "histograms": 0}
    accumulator = module.EventAccumulator(str(folder), size_guidance=guidance)
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def run(
    writer: TensorboardXWriter,
    storage: EventStorage,
    iterations: range,
    offset: float = 0.0,
    save_before: int | None = None,
) -> dict[str, Any]:
    """Trains, with a write every 10; returns a checkpoint from inside step `save_before`."""
    saved: dict[str, Any] = {}
    with storage:
        for i in iterations:
            storage.iter = i
            storage.put_scalar("lr", i + offset, smoothing_hint=False)
            if i == save_before:
                file = io.BytesIO()
                torch.save({"storage": storage.state_dict(), "writer": writer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            if i % 10 == 9:
                writer.write()
    return saved


def test_scalars_images_and_histograms_can_be_read_back(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    writer = new_writer(window_size=3)
    with EventStorage() as storage:
        for i, value in enumerate([8.0, 1.0, 5.0, 3.0]):
            storage.iter = i
            storage.put_scalar("loss", value)
            storage.put_scalar("lr", 0.5 * i, smoothing_hint=False)
        storage.put_scalar("top1", 0.25, smoothing_hint=False, cur_iter=1)
        storage.put_scalar("top1", 0.75, smoothing_hint=False, cur_iter=3)
        storage.put_image("picture", np.full((3, 4, 6), 255, dtype=np.uint8))
        storage.put_image("gray", torch.zeros(1, 4, 6))
        storage.put_histogram("weights", torch.tensor([[0.0, 1.0], [4.0, 4.0]]), bins=4)
        writer.write()
        writer.write()
    writer.close()
    read = events(tmp_path)
    assert scalars(tmp_path, "loss") == [(3, 3.0)]
    assert scalars(tmp_path, "lr") == [(3, 1.5)]
    assert scalars(tmp_path, "top1") == [(1, 0.25), (3, 0.75)]
    image = read.Images("picture")[0]
    assert (image.step, image.width, image.height) == (3, 6, 4)
    assert read.Images("gray")[0].width == 6
    histogram = read.Histograms("weights")[0]
    value = histogram.histogram_value
    assert (histogram.step, value.num, value.min, value.max) == (3, 4, 0.0, 4.0)
    assert (value.sum, value.sum_squares) == (9.0, 33.0)


def test_nothing_is_created_before_the_first_write(new_writer: NewWriter, tmp_path: Path) -> None:
    writer = new_writer()
    writer.state_dict()
    writer.close()
    assert list(tmp_path.iterdir()) == []


# Before the first write, between two writes, and in a step that writes.
@pytest.mark.parametrize("save", [5, 15, 19])
def test_resume_hides_what_the_killed_run_wrote_after_the_checkpoint(
    new_writer: NewWriter, tmp_path: Path, save: int
) -> None:
    killed = new_writer()
    saved = run(killed, EventStorage(), range(50), offset=0.5, save_before=save)
    killed.close()
    assert len(scalars(tmp_path, "lr")) == 5
    writer, storage = new_writer(), EventStorage(save + 1)
    writer.load_state_dict(saved["writer"])
    storage.load_state_dict(saved["storage"])
    if save % 10 == 9:
        with storage:
            writer.write()
    run(writer, storage, range(save + 1, 30))
    writer.close()
    of_killed = [i for i in (9, 19) if i <= save]
    of_resumed = [i for i in (9, 19, 29) if i > save]
    expected = [(i, i + 0.5) for i in of_killed] + [(i, float(i)) for i in of_resumed]
    assert scalars(tmp_path, "lr") == expected


def test_new_run_hides_an_earlier_one_in_the_same_folder(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    earlier, later = new_writer(), new_writer()
    run(earlier, EventStorage(), range(50))
    earlier.close()
    run(later, EventStorage(), range(20), offset=0.25)
    later.close()
    assert scalars(tmp_path, "lr") == [(9, 9.25), (19, 19.25)]


def test_run_that_starts_later_without_a_state_keeps_what_was_before(
    new_writer: NewWriter, tmp_path: Path
) -> None:
    earlier, later = new_writer(), new_writer()
    run(earlier, EventStorage(), range(50))
    earlier.close()
    run(later, EventStorage(20), range(20, 30), offset=0.25)
    later.close()
    assert scalars(tmp_path, "lr") == [(9, 9.0), (19, 19.0), (29, 29.25)]


def test_writer_goes_on_after_it_was_closed(new_writer: NewWriter, tmp_path: Path) -> None:
    writer, storage = new_writer(), EventStorage()
    run(writer, storage, range(20))
    writer.close()
    writer.close()
    run(writer, storage, range(20, 30))
    writer.close()
    assert scalars(tmp_path, "lr") == [(9, 9.0), (19, 19.0), (29, 29.0)]


def test_checkpoint_flushes_what_was_written(
    new_writer: NewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[object] = []
    monkeypatch.setattr(
        "torch.utils.tensorboard.SummaryWriter.flush", lambda self: flushed.append(self)
    )
    run(new_writer(), EventStorage(), range(12), save_before=11)
    assert len(flushed) == 1


def test_other_arguments_reach_the_summary_writer(new_writer: NewWriter, tmp_path: Path) -> None:
    writer = new_writer(filename_suffix=".mine")
    run(writer, EventStorage(), range(10))
    writer.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".mine"]


def test_missing_tensorboard_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = TensorboardXWriter(tmp_path)
    with (
        EventStorage(),
        pytest.raises(ConfigError, match=r"pip install 'trainkit\[tensorboard\]'"),
    ):
        writer.write()
