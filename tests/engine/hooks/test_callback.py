from typing import Any

import pytest

from trainkit.engine.hooks.callback import CallbackHook

METHODS = ("before_train", "after_train", "before_step", "after_backward", "after_step")


@pytest.mark.parametrize("method", METHODS)
def test_each_function_is_called_in_its_place_with_the_trainer(simple: Any, method: str) -> None:
    trainer = simple()
    calls: list[Any] = []
    trainer.register_hooks([CallbackHook(**{method: calls.append})])
    trainer.train(0, 2)
    num_calls = 1 if method.endswith("train") else 2
    assert calls == [trainer] * num_calls


def test_d11_functions_are_called_again_in_a_second_run(loop: Any) -> None:
    trainer = loop()
    ends: list[int] = []
    trainer.register_hooks([CallbackHook(after_train=lambda t: ends.append(t.iter))])
    trainer.train(0, 2)
    trainer.train(2, 5)
    assert ends == [2, 5]
