import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer
from trainkit.engine.train_loop import SimpleTrainer

MakeTrainer = Callable[..., SimpleTrainer]


def checkpointer_of(trainer: SimpleTrainer, folder: Path) -> Checkpointer:
    return Checkpointer(trainer.model, folder, trainer=weakref.proxy(trainer))


def saved(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.pth"))


def content(folder: Path, name: str) -> dict[str, Any]:
    data: dict[str, Any] = torch.load(folder / f"{name}.pth", weights_only=True)
    return data


def stop_at(iteration: int, finished: bool) -> CallbackHook:
    """Asks for the stop before the step, so that the checkpointer knows of it."""

    def stop(trainer: SimpleTrainer) -> None:
        if trainer.iter == iteration:
            trainer.request_stop("test", finished)

    return CallbackHook(before_step=stop)


@pytest.fixture
def trainer(simple: MakeTrainer) -> SimpleTrainer:
    return simple(seed=1)


@pytest.mark.parametrize(
    ("period", "expected"),
    [
        (2, ["model_0000001", "model_0000003", "model_final"]),
        (5, ["model_0000004", "model_final"]),
        (0, ["model_final"]),
    ],
)
def test_it_saves_when_due_and_after_the_last_step(
    trainer: SimpleTrainer, tmp_path: Path, period: int, expected: list[str]
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    # The trainer knows the length of the run better.
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, period, max_iter=3)])
    trainer.train(0, 5)
    assert saved(tmp_path) == expected
    final = content(tmp_path, "model_final")
    assert (final["iteration"], final["trainer"]["iteration"]) == (4, 4)


def test_a_save_slower_than_torchrun_allows_is_told_once(
    trainer: SimpleTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    trainer.register_hooks([PeriodicCheckpointer(checkpointer_of(trainer, tmp_path), 1)])
    trainer.train(0, 3)
    assert caplog.text.count("--shutdown-timeout") == 1
    caplog.clear()
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    trainer.register_hooks([PeriodicCheckpointer(checkpointer_of(trainer, tmp_path), 1)])
    trainer.train(0, 3)
    assert "--shutdown-timeout" not in caplog.text


def test_only_the_newest_are_kept(trainer: SimpleTrainer, tmp_path: Path) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks(
        [PeriodicCheckpointer(checkpointer, 1, max_to_keep=2, file_prefix="net")]
    )
    trainer.train(0, 5)
    assert saved(tmp_path) == ["net_0000003", "net_0000004", "net_final"]


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_run_is_saved_and_goes_on(
    trainer: SimpleTrainer, simple: MakeTrainer, tmp_path: Path, at: int
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 2), stop_at(at, finished=False)])
    trainer.train(0, 5)
    assert saved(tmp_path)[-1] == f"model_000000{at}"
    assert "model_final" not in saved(tmp_path)

    unbroken, resumed = simple(seed=1), simple(seed=1)
    unbroken.train(0, 5)
    checkpointer_of(resumed, tmp_path).resume_or_load("")
    resumed.train(resumed.iter + 1, 5)
    assert torch.equal(resumed.model.linear.weight, unbroken.model.linear.weight)  # type: ignore[union-attr,arg-type]  # Regression's


def test_a_run_interrupted_in_its_last_step_is_saved_once(
    trainer: SimpleTrainer, tmp_path: Path
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 0), stop_at(4, finished=False)])
    trainer.train(0, 5)
    assert saved(tmp_path) == ["model_final"]


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_ends_early_has_a_final_checkpoint(
    trainer: SimpleTrainer, simple: MakeTrainer, tmp_path: Path, before: bool
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    stop = stop_at(2, finished=True)
    if not before:
        # Only after the checkpointer has run, as an early stopping does.
        stop = CallbackHook(after_step=stop._before_step)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 0), stop])
    trainer.train(0, 10)
    final = content(tmp_path, "model_final")
    assert (final["iteration"], final["trainer"]["max_iter"]) == (2, 3)
    resumed = simple(seed=1)
    checkpointer_of(resumed, tmp_path).resume_or_load("")
    resumed.train(resumed.iter + 1, 10)
    assert resumed.iter == 3


def test_a_failed_run_saves_nothing_more(trainer: SimpleTrainer, tmp_path: Path) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)

    def fail(trainer: SimpleTrainer) -> None:
        if trainer.iter == 4:
            raise RuntimeError("in the last step")

    trainer.register_hooks(
        [PeriodicCheckpointer(checkpointer, 3), CallbackHook(after_backward=fail)]
    )
    with pytest.raises(RuntimeError, match="in the last step"):
        trainer.train(0, 5)
    assert saved(tmp_path) == ["model_0000002"]


def test_no_steps_save_nothing(trainer: SimpleTrainer, tmp_path: Path) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1)])
    trainer.train(0, 0)
    assert saved(tmp_path) == []


def test_a_run_killed_before_its_final_save_makes_up_for_it(
    trainer: SimpleTrainer, tmp_path: Path
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1)])
    trainer.train(3, 3)
    assert saved(tmp_path) == ["model_final"]


def test_a_second_run_saves_its_end_again(trainer: SimpleTrainer, tmp_path: Path) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 0)])
    trainer.train(0, 2)
    trainer.train(2, 4)
    assert content(tmp_path, "model_final")["iteration"] == 3


def test_d03_no_checkpoint_holds_a_bad_step(trainer: SimpleTrainer, tmp_path: Path) -> None:
    def poison(trainer: SimpleTrainer) -> None:
        if trainer.iter == 3:
            # As with an accelerator, nobody hears of it until it is brought over.
            trainer._metrics.put(trainer.storage, {"a": torch.tensor(math.nan)}, 0.0, "", None)

    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([CallbackHook(after_step=poison), PeriodicCheckpointer(checkpointer, 2)])
    with pytest.raises(FloatingPointError, match="Iteration 3"):
        trainer.train(0, 10)
    assert saved(tmp_path) == ["model_0000001"]


def evaluating(trainer: SimpleTrainer, values: dict[int, float], hook: BestCheckpointer) -> None:
    """Puts a value as the metric at some iterations; 99 stands for after_train."""

    def put(key: int) -> None:
        if key in values:
            trainer_ref().storage.put_scalar("task/acc", values[key], smoothing_hint=False)  # type: ignore[union-attr]  # alive

    trainer_ref = weakref.ref(trainer)
    evaluation = CallbackHook(after_step=lambda t: put(t.iter), after_train=lambda t: put(99))
    trainer.register_hooks([evaluation, hook])


def best(trainer: SimpleTrainer, folder: Path, **kwargs: Any) -> BestCheckpointer:
    return BestCheckpointer(1, checkpointer_of(trainer, folder), "task/acc", **kwargs)


@pytest.mark.parametrize(
    ("mode", "values", "best_iter"),
    [
        ("max", {0: 0.1, 1: 0.3, 2: 0.2}, 1),
        ("min", {0: 0.1, 1: 0.3, 2: 0.2}, 0),
        ("max", {0: 0.1, 99: 0.3}, 4),
        # An equal one is no better.
        ("max", {0: 0.3, 1: 0.3}, 0),
    ],
)
def test_the_best_model_is_kept(
    trainer: SimpleTrainer, tmp_path: Path, mode: str, values: dict[int, float], best_iter: int
) -> None:
    evaluating(trainer, values, best(trainer, tmp_path, mode=mode, file_prefix="top"))
    trainer.train(0, 5)
    assert saved(tmp_path) == ["top"]
    assert content(tmp_path, "top")["iteration"] == best_iter


@pytest.mark.parametrize(
    ("mode", "values", "best_iter"),
    [
        ("max", {0: math.nan, 1: 0.1, 2: math.inf, 3: math.nan}, 1),
        ("min", {0: 0.1, 1: -math.inf, 2: math.nan}, 0),
        ("max", {0: -math.inf, 1: -5.0}, 1),
        ("max", {0: 0.1, 99: math.inf}, 0),
    ],
)
def test_d19_a_metric_that_is_not_finite_is_never_the_best(
    trainer: SimpleTrainer, tmp_path: Path, mode: str, values: dict[int, float], best_iter: int
) -> None:
    evaluating(trainer, values, best(trainer, tmp_path, mode=mode))
    trainer.train(0, 5)
    assert content(tmp_path, "model_best")["iteration"] == best_iter


def test_d19_the_best_of_the_final_evaluation_is_that_of_the_last_step(
    trainer: SimpleTrainer, simple: MakeTrainer, tmp_path: Path
) -> None:
    evaluating(trainer, {0: 0.1, 99: 0.3}, best(trainer, tmp_path))
    trainer.train(0, 5)
    data = content(tmp_path, "model_best")
    assert (data["iteration"], data["trainer"]["iteration"]) == (4, 4)
    resumed = simple(seed=1)
    checkpointer_of(resumed, tmp_path).load(str(tmp_path / "model_best.pth"))
    resumed.train(resumed.iter + 1, 7)
    steps = [i for _, i in resumed.storage.history("total_loss").values()]
    assert steps == list(range(7))


def test_d19_the_best_model_does_not_become_the_last_checkpoint(
    trainer: SimpleTrainer, tmp_path: Path
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 2)])
    evaluating(trainer, {2: 0.1, 99: 0.3}, best(trainer, tmp_path))
    named: list[str] = []

    def note(trainer: SimpleTrainer) -> None:
        if trainer.iter >= 1:
            named.append((tmp_path / "last_checkpoint").read_text())

    trainer.register_hooks([CallbackHook(after_step=note, after_train=note)])
    trainer.train(0, 4)
    names = ["model_0000001.pth", "model_0000001.pth", "model_final.pth", "model_final.pth"]
    assert named == names


def test_d19_a_metric_of_earlier_weights_is_not_attributed_to_later_ones(
    trainer: SimpleTrainer, tmp_path: Path
) -> None:
    # It judges after iterations 1 and 3, and is asked about what was put after 0 and 3.
    hook = BestCheckpointer(2, checkpointer_of(trainer, tmp_path), "task/acc")
    evaluating(trainer, {0: 0.9, 3: 0.5}, hook)
    saves: list[int] = []
    trainer.register_hooks([CallbackHook(after_step=lambda t: saves.append(len(saved(tmp_path))))])
    trainer.train(0, 6)
    assert content(tmp_path, "model_best")["iteration"] == 3
    assert saves == [0, 0, 0, 1, 1, 1]


def test_a_metric_that_is_never_put_is_named(
    trainer: SimpleTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.register_hooks([best(trainer, tmp_path)])
    with caplog.at_level(logging.WARNING):
        trainer.train(0, 1)
    assert "task/acc was not put by any evaluation" in caplog.text
    assert "total_loss" in caplog.text
    assert saved(tmp_path) == []


@pytest.mark.parametrize("stop", [stop_at(4, finished=False), None])
def test_d13_a_run_that_did_not_succeed_has_no_last_best(
    trainer: SimpleTrainer, tmp_path: Path, stop: CallbackHook | None
) -> None:
    def fail(trainer: SimpleTrainer) -> None:
        if trainer.iter == 4:
            raise RuntimeError("in the last step")

    evaluating(trainer, {99: 0.5}, best(trainer, tmp_path))
    trainer.register_hooks([stop or CallbackHook(after_step=fail)])
    if stop is None:
        with pytest.raises(RuntimeError, match="in the last step"):
            trainer.train(0, 5)
    else:
        trainer.train(0, 5)
    assert saved(tmp_path) == []


def test_d18_a_resumed_run_does_not_replace_a_better_model(
    trainer: SimpleTrainer, simple: MakeTrainer, tmp_path: Path
) -> None:
    evaluating(trainer, {0: 0.9}, best(trainer, tmp_path))
    trainer.train(0, 2)
    resumed = simple(seed=1)
    evaluating(resumed, {2: 0.1, 3: 0.2}, best(resumed, tmp_path))
    checkpointer_of(resumed, tmp_path).resume_or_load("")
    resumed.train(1, 5)
    assert content(tmp_path, "model_best")["iteration"] == 0
    hook = resumed._hooks[1]
    assert hook.state_dict() == {"best": 0.9, "best_iter": 0}


def test_an_unknown_mode_is_an_error(trainer: SimpleTrainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mode is 'maximum'.*'max' or 'min'"):
        best(trainer, tmp_path, mode="maximum")


def test_the_best_of_a_metric_put_after_the_last_step_is_kept(
    trainer: SimpleTrainer, tmp_path: Path
) -> None:
    checkpointer = checkpointer_of(trainer, tmp_path)

    def put(t: SimpleTrainer) -> None:
        t.storage.put_scalar("val_loss", 1.0 / (t.iter + 1), smoothing_hint=False)

    trainer.register_hooks(
        [CallbackHook(after_step=put), BestCheckpointer(2, checkpointer, "val_loss", mode="min")]
    )
    trainer.train(0, 4)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 3
