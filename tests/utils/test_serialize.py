import copy
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from trainkit.utils.errors import ConfigError
from trainkit.utils.serialize import PicklableWrapper


class Adder:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, value: int) -> int:
        return self.number + value


def send(wrapper: PicklableWrapper) -> PicklableWrapper:
    arrived = pickle.loads(pickle.dumps(wrapper))
    assert isinstance(arrived, PicklableWrapper)
    return arrived


def test_it_is_called_like_the_object_and_has_its_attributes() -> None:
    wrapper = PicklableWrapper(PicklableWrapper(Adder(3)))
    assert wrapper(4) == 7
    assert wrapper.number == 3
    assert copy.deepcopy(wrapper)(4) == 7
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapper.nothing


def test_what_pickle_can_do_needs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    assert send(PicklableWrapper(Adder(3)))(4) == 7
    assert send(PicklableWrapper(len))("abc") == 3


def test_lambdas_and_closures_go_by_cloudpickle() -> None:
    number = 3
    assert send(PicklableWrapper(lambda value: number + value))(4) == 7


def test_without_cloudpickle_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(
        ConfigError, match=r"<lambda>.*cannot be pickled.*pip install 'trainkit\[pickle\]'"
    ):
        pickle.dumps(PicklableWrapper(lambda: 0))


@pytest.mark.slow
def test_a_lambda_runs_in_a_new_process() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(PicklableWrapper(lambda value: value + 1), 1).result() == 2
