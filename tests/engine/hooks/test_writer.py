import errno
import json
from pathlib import Path
from typing import Any

import pytest

from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.writer import PeriodicWriter
from trainkit.utils.events.json_writer import JSONWriter
from trainkit.utils.events.storage import get_event_storage
from trainkit.utils.events.writer import EventWriter


class Writer(EventWriter):
    def __init__(self, log: list[str], name: str = "w", fail: str = "") -> None:
        self.log = log
        self.name = name
        self.fail = fail

    def _do(self, what: str) -> None:
        self.log.append(f"{self.name}.{what} {get_event_storage().iter}")
        if what == self.fail:
            raise OSError(f"{self.name}.{what}")

    def write(self) -> None:
        self._do("write")

    def close(self) -> None:
        self._do("close")

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log.append(f"{self.name} loads {state}")


def test_writers_write_when_due_after_the_last_step_and_at_the_end(loop: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([PeriodicWriter([Writer(log)], period=3)])
    trainer.train(0, 7)
    assert log == ["w.write 2", "w.write 5", "w.write 6", "w.write 7", "w.close 7"]


def test_period_0_writes_only_at_the_end(loop: Any) -> None:
    log: list[str] = []
    trainer = loop()
    trainer.register_hooks([PeriodicWriter([Writer(log)], period=0)])
    trainer.train(0, 4)
    assert log == ["w.write 3", "w.write 4", "w.close 4"]


def test_a_failed_run_is_written_and_closed(loop: Any) -> None:
    log: list[str] = []
    trainer = loop(fail_at=2)
    trainer.register_hooks([PeriodicWriter([Writer(log)])])
    with pytest.raises(RuntimeError, match="step 2"):
        trainer.train(0, 4)
    assert log == ["w.write 2", "w.close 2"]


@pytest.mark.parametrize("what", ["write", "close"])
def test_every_writer_is_closed_even_when_one_raises(loop: Any, what: str) -> None:
    log: list[str] = []
    trainer = loop()
    writers = [Writer(log, "a", fail=what), Writer(log, "b")]
    trainer.register_hooks([PeriodicWriter(writers, period=0)])
    with pytest.raises(OSError, match=f"a.{what}"):
        trainer.train(0, 0)
    assert {"a.close 0", "b.close 0", "b.write 0"} <= set(log)


def test_d04_metrics_that_late_hooks_put_at_the_end_are_written(loop: Any, tmp_path: Path) -> None:
    trainer = loop()
    trainer.register_hooks([PeriodicWriter([JSONWriter(tmp_path / "metrics.json")], period=2)])
    trainer.register_hooks(
        [
            CallbackHook(
                after_step=lambda t: t.storage.put_scalar("late", t.iter),
                after_train=lambda t: t.storage.put_scalar("final", 0.5, smoothing_hint=False),
            )
        ]
    )
    trainer.train(0, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[0]["iteration"] == 1
    assert "late" in lines[0]
    assert lines[-1] == {"iteration": 3, "final": 0.5}


def test_d04_a_second_run_writes_again(loop: Any, tmp_path: Path) -> None:
    trainer = loop()
    trainer.register_hooks([CallbackHook(after_step=lambda t: t.storage.put_scalar("a", t.iter))])
    trainer.register_hooks([PeriodicWriter([JSONWriter(tmp_path / "metrics.json")], period=1)])
    trainer.train(0, 3)
    trainer.train(3, 5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]


def test_d34_images_and_histograms_are_forgotten_once_all_have_written_them(loop: Any) -> None:
    import torch

    left: list[int] = []
    seen: list[int] = []

    class Consumer(EventWriter):
        def write(self) -> None:
            seen.append(len(get_event_storage().images))

    trainer = loop()
    trainer.register_hooks(
        [
            CallbackHook(before_step=lambda t: t.storage.put_image("i", torch.zeros(1, 2, 2))),
            CallbackHook(before_step=lambda t: t.storage.put_histogram("h", torch.ones(3))),
            PeriodicWriter([Consumer(), Consumer()], period=2),
        ]
    )
    last = CallbackHook(
        after_step=lambda t: left.append(len(t.storage.images) + len(t.storage.raw_histograms))
    )
    last.priority = 100
    trainer.register_hooks([last])
    trainer.train(0, 4)
    assert left == [2, 0, 2, 0]
    # Of two writes, and of the one at the end.
    assert seen == [2, 2, 2, 2, 0, 0]


def test_each_writer_gets_its_own_state_back() -> None:
    log: list[str] = []
    saved = PeriodicWriter([Writer(log, "a"), Writer(log, "b")]).state_dict()
    PeriodicWriter([Writer(log, "c"), Writer(log, "d"), Writer(log, "e")]).load_state_dict(saved)
    assert log == ["c loads {'name': 'a'}", "d loads {'name': 'b'}"]


class FullDisk(EventWriter):
    """Writes to a disk that is full, and then is not."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self) -> None:
        iteration = get_event_storage().iter
        if iteration == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written.append(iteration)


def test_with_warn_a_run_survives_writers_that_the_storage_refuses(
    loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    writer, other = FullDisk(), FullDisk()
    trainer = loop()
    trainer.register_hooks([PeriodicWriter([writer, other], period=1, on_error="warn")])
    trainer.train(0, 3)
    assert writer.written == other.written == [0, 2, 3]
    assert caplog.text.count("GOES ON WITHOUT METRICS, by FullDisk.write. [Errno 28]") == 2


def test_otherwise_the_error_of_the_storage_ends_the_run(loop: Any) -> None:
    trainer = loop()
    trainer.register_hooks([PeriodicWriter([FullDisk()], period=1)])
    with pytest.raises(OSError, match="No space left"):
        trainer.train(0, 3)
