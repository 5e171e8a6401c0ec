"""F22: each kind of hook raises in each of its methods."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.killed_run import small_cfg
from trainkit.data import DatasetCatalog
from trainkit.engine import CallbackHook, DefaultTrainer, HookBase

pytestmark = pytest.mark.faults

METHODS = ("before_train", "before_step", "after_backward", "after_step", "after_train")

KINDS = (
    *("IterationTimer", "LRScheduler", "EMA", "PreciseBN", "TimeLimit", "PeriodicCheckpointer"),
    *("ValidationLoss", "EvalHook", "BestCheckpointer", "EarlyStopping"),
    *("CallbackHook", "PeriodicWriter"),
)

OPTS = ["SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 2]
OPTS += ["TEST.EVAL_PERIOD", 2, "LOG_PERIOD", 1, "DATALOADER.NUM_WORKERS", 0]
OPTS += ["MODEL.EMA.ENABLED", True, "DATASETS.VAL", ("tiny_test",), "SOLVER.MAX_SECONDS", 900]
OPTS += ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1]
OPTS += ["TEST.EARLY_STOPPING.METRIC", "val/total_loss"]


@pytest.fixture(autouse=True)
def _data_sets_are_forgotten() -> Iterator[None]:
    yield
    for name in ("tiny_train", "tiny_test"):
        DatasetCatalog.remove(name)


class Watched(DefaultTrainer):
    """Notes whose `after_train` has run."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.register_hooks([CallbackHook()])
        self.ended: list[str] = []
        for hook in self._hooks:
            hook.after_train = self._noting(hook)  # type: ignore[method-assign]  # as users may

    @property
    def kinds(self) -> list[str]:
        return [type(hook).__name__ for hook in self._hooks]

    def _noting(self, hook: HookBase) -> Callable[[], None]:
        after_train = hook.after_train

        def run() -> None:
            self.ended.append(type(hook).__name__)
            after_train()

        return run


def fail(trainer: Watched, kind: str, method: str) -> None:
    """Makes a hook fail in a method, from iteration 2 on."""
    hook = trainer._hooks[trainer.kinds.index(kind)]
    before: Callable[[], None] = getattr(hook, method)

    def failing() -> None:
        before()
        if trainer.iter >= 2 or method == "before_train":
            raise ValueError(f"{kind}.{method} is broken")

    setattr(hook, method, failing)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_f22_the_other_hooks_end_and_the_error_reaches_the_user(
    tmp_path: Path, kind: str, method: str
) -> None:
    trainer = Watched(small_cfg(tmp_path, OPTS))
    assert set(KINDS) == set(trainer.kinds)
    fail(trainer, kind, method)
    with pytest.raises(ValueError, match=rf"^{kind}\.{method} is broken"):
        trainer.train()
    # Of those after the one that did not start, there is nothing to end.
    started = trainer.kinds.index(kind) if method == "before_train" else len(KINDS)
    assert trainer.ended == trainer.kinds[:started]
    assert (trainer.iter == trainer.max_iter) == (method == "after_train")
    assert not (tmp_path / "finished.json").exists()
    resumed = Watched(small_cfg(tmp_path, OPTS))
    resumed.resume_or_load()
    resumed.train()
    assert resumed.iter == resumed.max_iter
    assert (tmp_path / "finished.json").exists()


@pytest.mark.parametrize("first", METHODS)
def test_f22_the_first_of_several_errors_reaches_the_user(tmp_path: Path, first: str) -> None:
    trainer = Watched(small_cfg(tmp_path, OPTS))
    fail(trainer, "IterationTimer", first)
    later = [kind for kind in KINDS if kind != "IterationTimer"]
    for kind in later:
        fail(trainer, kind, "after_train")
    with pytest.raises(ValueError, match=rf"^IterationTimer\.{first} is broken") as raised:
        trainer.train()
    notes = "\n".join(raised.value.__notes__)
    # Of those that never started, none was to end.
    assert [kind in notes for kind in later] == [first != "before_train"] * len(later)


@pytest.mark.parametrize("method", METHODS[1:])
def test_f22_a_resume_after_a_hook_failed_is_exact(tmp_path: Path, method: str) -> None:
    unbroken = Watched(small_cfg(tmp_path / "unbroken", OPTS))
    unbroken.train()
    broken = Watched(small_cfg(tmp_path / "broken", OPTS))
    fail(broken, "CallbackHook", method)
    with pytest.raises(ValueError, match="is broken"):
        broken.train()
    resumed = Watched(small_cfg(tmp_path / "broken", OPTS))
    resumed.resume_or_load()
    resumed.train()
    ended, expected = resumed.model.state_dict(), unbroken.model.state_dict()
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
