import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trainkit.engine.failures import call_each, log_failure, note_place, place_of
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.non_finite import NonFiniteError
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.evaluation.evaluator import inference_on_dataset
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError


def failing(text: str) -> Any:
    def fail() -> None:
        raise ValueError(text)

    return fail


def test_call_each_calls_all_and_raises_the_first_error_with_the_others_as_notes() -> None:
    called: list[str] = []
    with pytest.raises(ValueError, match=r"^one") as raised:
        call_each([failing("one"), lambda: called.append("two"), failing("three")])
    assert called == ["two"]
    assert len(raised.value.__notes__) == 1
    assert "fail raised too: ValueError('three')" in raised.value.__notes__[0]


def test_call_each_leaves_a_failure_to_its_caller_and_gives_it_the_notes() -> None:
    failure = RuntimeError("before")
    call_each([failing("one"), lambda: call_each([failing("two"), failing("three")])], failure)
    assert [note.split(": ")[1] for note in failure.__notes__] == [
        "ValueError('one')",
        "ValueError('two')",
        "ValueError('three')",
    ]


def test_call_each_raises_inside_an_except_block_too() -> None:
    try:
        raise KeyError("handled")
    except KeyError:
        with pytest.raises(ValueError, match=r"^new$"):
            call_each([failing("new")])


def note_of(run: Callable[[], Any]) -> str:
    """Returns the one note of the error that `run` raises."""
    with pytest.raises(ValueError, match="now") as raised:
        run()
    (note,) = raised.value.__notes__
    return str(note)


def fail(*args: Any) -> Any:
    raise ValueError("now")


@pytest.mark.parametrize("method", ["before_train", "before_step", "after_backward", "after_step"])
def test_an_error_of_a_hook_names_its_class_and_method(
    simple: Callable[..., SimpleTrainer], method: str
) -> None:
    trainer = simple()
    # Fails below helpers of its own.
    trainer.register_hooks([CallbackHook(**{method: fail})])
    note = note_of(lambda: trainer.train(2, 5))
    assert note == f"Training failed in iteration 2, in the hook CallbackHook.{method}."


def test_the_hook_whose_state_fails_is_named_not_the_one_that_saves(
    simple: Callable[..., SimpleTrainer],
) -> None:
    class Stateful(HookBase):
        def state_dict(self) -> Any:
            fail()

    trainer = simple()
    trainer.register_hooks([CallbackHook(after_step=lambda t: t.state_dict()), Stateful()])
    assert note_of(lambda: trainer.train(0, 1)).endswith("Stateful.state_dict.")


def test_errors_in_data_model_and_own_steps_name_their_place(
    simple: Callable[..., SimpleTrainer], loop: Any, samples: list[Any]
) -> None:
    class Net(torch.nn.Linear):
        def forward(self, batch: Any) -> Any:
            fail()

    def batches() -> Iterator[Any]:
        yield samples[0]
        fail()

    class Own(loop):  # type: ignore[misc]  # a fixture
        def run_step(self) -> None:
            fail()

    notes = [
        note_of(lambda: simple(data_loader=batches()).train(0, 5)),
        note_of(lambda: simple(Net(4, 1)).train(0, 5)),
        note_of(lambda: Own().train(0, 5)),
    ]
    assert notes == [
        "Training failed in iteration 1, fetching a batch.",
        "Training failed in iteration 0, in the forward or backward pass.",
        "Training failed in iteration 0, in the step.",
    ]


def test_an_error_in_evaluation_names_it_and_not_its_hook(
    simple: Callable[..., SimpleTrainer], regression: Any
) -> None:
    trainer = simple()
    model = regression()
    trainer.register_hooks([EvalHook(2, lambda: inference_on_dataset(model, [fail], None))])
    model.forward = fail
    note = note_of(lambda: trainer.train(0, 5))
    assert note == "Training failed in iteration 1, in evaluation."


def test_an_error_of_none_of_these_has_no_place() -> None:
    with pytest.raises(ValueError, match="now") as raised:
        fail()
    assert place_of(raised.value) == ""


def test_with_several_ranks_the_rank_is_named_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    inside, outside = ValueError(), ValueError()
    note_place(inside, 7)
    # As the launcher does with whatever a rank raises.
    note_place(inside)
    note_place(outside)
    assert inside.__notes__ == ["Training failed in iteration 7 on rank 1."]
    assert outside.__notes__ == ["Failed on rank 1, outside of training."]


@pytest.mark.parametrize(
    ("error", "has_traceback"),
    [(ConfigError("a\nb"), False), (NonFiniteError("a"), False), (ValueError("a\nb"), True)],
)
def test_the_log_has_a_traceback_unless_the_text_says_all(
    caplog: pytest.LogCaptureFixture, error: Exception, has_traceback: bool
) -> None:
    try:
        raise error
    except Exception as e:
        log_failure(3, e)
    (record,) = caplog.records
    text = "a" if has_traceback else str(error)
    assert record.getMessage() == f"Training failed in iteration 3. {type(error).__name__}: {text}"
    assert bool(record.exc_info) == has_traceback


def test_looking_for_the_place_keeps_nothing_alive(
    simple: Callable[..., SimpleTrainer], no_gc: Any
) -> None:
    logging.disable()  # pytest keeps log records, which hold the frames.
    trainer = simple()
    trainer.register_hooks([CallbackHook(after_step=fail)])
    place = ""
    try:
        trainer.train(0, 5)
    except ValueError as e:
        place = e.__notes__[0]
    logging.disable(logging.NOTSET)
    assert place.endswith("CallbackHook.after_step.")
    alive = no_gc(trainer.model, trainer.optimizer, trainer)
    del trainer
    assert [ref() for ref in alive] == [None, None, None]
