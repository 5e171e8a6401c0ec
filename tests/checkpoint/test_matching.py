"""Weights go where they belong; what does not fit is left alone and reported."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainkit.checkpoint.matching import (
    Difference,
    check_has_all,
    check_is_same,
    differences,
    explaining_misfit,
    find_weights,
    list_incompatible,
    load_what_fits,
    split_options,
    tabulate_differences,
)
from trainkit.utils.errors import CheckpointError
from trainkit.utils.wrappers import unwrap


class Compiled(nn.Module):
    """What torch.compile returns, as far as names go."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def is_filled(model: nn.Module, value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state"])
def test_weights_are_found_under_each_name(key: str) -> None:
    weights = {"w": torch.zeros(1)}
    assert find_weights({key: weights, "iteration": 3}, "a.pth") == {
        "model": weights,
        "iteration": 3,
    }


def test_bare_weights_are_found() -> None:
    weights = {"w": torch.zeros(1), "v": np.zeros(1)}
    assert find_weights(weights, "a.pth") == {"model": weights}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, "it is a dict. Expected"),
        ({"epoch": 3, "w": torch.zeros(1)}, "it is a dict of epoch, w. Expected"),
        ([torch.zeros(1)], "it is a list. Expected"),
        (torch.zeros(1), "it is a Tensor. Expected"),
    ],
)
def test_other_contents_are_refused(data: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.pth holds no weights: {text}"):
        find_weights(data, "a.pth")


def wrap_ddp(module: nn.Module) -> nn.Module:
    return nn.DataParallel(module)


def parallel_inside(module: Net) -> nn.Module:
    module.head = wrap_ddp(module.head)  # type: ignore[assignment]  # as is usual for large parts
    return module


def wrap_inside(module: Net) -> nn.Module:
    module.body = Compiled(module.body)  # type: ignore[assignment]  # as in model.body = compile()
    return module


WRAPPERS: dict[str, Any] = {
    "plain": lambda net: net,
    "parallel": wrap_ddp,
    "compiled": Compiled,
    "compiled parallel": lambda net: Compiled(wrap_ddp(net)),
    "parallel compiled": lambda net: wrap_ddp(Compiled(net)),
    "compiled inside": wrap_inside,
    "parallel inside": parallel_inside,
    "all at once": lambda net: wrap_ddp(Compiled(parallel_inside(wrap_inside(net)))),  # type: ignore[arg-type]  # still a Net
}


@pytest.mark.parametrize("target", WRAPPERS)
@pytest.mark.parametrize("source", WRAPPERS)
def test_d25_wrappers_of_either_side_make_no_difference(source: str, target: str) -> None:
    state = WRAPPERS[source](filled(Net(), 1)).state_dict()
    model = WRAPPERS[target](filled(Net(), 0))
    incompatible = load_what_fits(model, state)
    assert list_incompatible(model, incompatible) == []
    assert is_filled(model, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in torch's compiler
def test_d25_weights_pass_in_and_out_of_what_torch_compile_returns() -> None:
    compiled: Any = torch.compile(filled(Net(), 1))
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    model = filled(Net(), 0)
    load_what_fits(model, compiled.state_dict())
    assert is_filled(model, 1)
    load_what_fits(compiled, filled(Net(), 2).state_dict())
    assert is_filled(compiled, 2)


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = filled(Outer(), 0)
    load_what_fits(model, filled(Outer(), 1).state_dict())
    assert is_filled(model, 1)


def test_names_that_only_end_alike_are_loaded_if_that_is_asked_for() -> None:
    state = {f"encoder.{name}": value for name, value in filled(Net(), 1).state_dict().items()}
    model = filled(nn.Sequential(Net()), 0)
    with pytest.raises(CheckpointError, match=r"append \?matching_heuristics=True to it"):
        load_what_fits(model, dict(state))
    incompatible = load_what_fits(model, state, heuristics=True)
    assert list_incompatible(model, incompatible) == []
    assert is_filled(model, 1)


def test_entries_that_only_end_alike_need_the_same_shape() -> None:
    model = filled(nn.Sequential(Net(3)), 0)
    state = {"a.head.weight": torch.ones(2, 5), "a.head.bias": torch.ones(2)}
    incompatible = load_what_fits(model, state, heuristics=True)
    assert incompatible.incorrect_shapes == [("0.head.weight", (2, 5), (2, 3))]
    assert model.get_parameter("0.head.bias").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("path", "rest", "options"),
    [
        ("a.pth", "a.pth", []),
        ("a.pth?strict=True", "a.pth", ["strict"]),
        (
            "/x/a.pth?matching_heuristics=True&strict=True",
            *("/x/a.pth", ["matching_heuristics", "strict"]),
        ),
        ("https://h/a?v=2&strict=True#sha256=0", "https://h/a?v=2#sha256=0", ["strict"]),
        ("https://h/a?strict=True&v=2", "https://h/a?strict=True&v=2", []),
        ("b?x.pth", "b?x.pth", []),
    ],
)
def test_options_stand_at_the_end_of_a_path(path: str, rest: str, options: list[str]) -> None:
    assert split_options(path) == (rest, options)


def test_modules_are_unwrapped_in_any_order() -> None:
    net = Net()
    for wrap in ("plain", "parallel", "compiled", "compiled parallel", "parallel compiled"):
        assert unwrap(WRAPPERS[wrap](net)) is net


def test_what_fits_is_loaded_and_the_rest_reported() -> None:
    model = filled(Net(3), 0)
    state = filled(Net(3), 1).state_dict()
    state["head.weight"] = torch.ones(5, 3)
    state["extra.weight"] = state.pop("head.bias")
    incompatible = load_what_fits(model, state)
    assert incompatible.incorrect_shapes == [("head.weight", (5, 3), (2, 3))]
    assert incompatible.missing_keys == ["head.bias"]
    assert incompatible.unexpected_keys == ["extra.weight"]
    assert is_filled(model.get_submodule("body"), 1)
    assert is_filled(model.get_submodule("head"), 0)
    assert list_incompatible(model, incompatible) == [
        Difference("head.weight", "(5, 3)", "(2, 3)"),
        Difference("head.bias", "absent", "float32 (2,)"),
        Difference("extra.weight", "not used", "absent"),
    ]


def test_nothing_that_fits_is_an_error_with_a_table() -> None:
    model = filled(nn.Linear(2, 2), 0)
    with pytest.raises(CheckpointError, match=r"(?s)Nothing .* fits.*weight .*\(3, 3\).*MODEL.WEI"):
        load_what_fits(model, {"weight": torch.zeros(3, 3), "other": torch.zeros(1)})
    assert is_filled(model, 0)


def test_a_model_without_parameters_takes_anything() -> None:
    assert load_what_fits(nn.ReLU(), {"w": torch.zeros(1)}).unexpected_keys == ["w"]


def test_arrays_become_tensors() -> None:
    model = filled(nn.Linear(2, 1), 0)
    load_what_fits(
        model, {"weight": np.ones((1, 2), np.float32), "bias": np.ones((1,), np.float32)}
    )
    assert is_filled(model, 1)


def test_memory_that_was_loaded_under_another_name_is_not_missing() -> None:
    model = Tied()
    assert load_what_fits(model, {"a.weight": torch.ones(2, 2)}).missing_keys == []
    assert is_filled(model, 1)


def test_a_lazy_module_takes_the_shape_that_comes() -> None:
    model = nn.LazyLinear(2)
    state = nn.Linear(3, 2).state_dict()
    assert differences(state, model.state_dict()) == []
    load_what_fits(model, state)
    assert tuple(model.weight.shape) == (2, 3)


def test_extra_state_of_a_module_passes() -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    source, target = Counting(2, 2), Counting(2, 2)
    source.count = 7
    assert differences(source.state_dict(), target.state_dict()) == []
    load_what_fits(target, source.state_dict())
    assert target.count == 7


def test_differences_are_in_keys_shapes_and_dtypes() -> None:
    own = OrderedDict(a=torch.zeros(1), b=torch.zeros(2), c=torch.zeros(3), d=torch.zeros(4))
    state = {"b": torch.zeros(2), "c": torch.zeros(3, 1), "d": torch.zeros(4).half(), "e": 5}
    assert differences(state, own) == [
        Difference("a", "absent", "float32 (1,)"),
        Difference("c", "float32 (3, 1)", "float32 (3,)"),
        Difference("d", "float16 (4,)", "float32 (4,)"),
        Difference("e", "int", "absent"),
    ]


def test_a_table_has_ten_rows_of_each_kind() -> None:
    found = [Difference(f"missing{i}", "absent", "x") for i in range(12)]
    found += [Difference(f"unused{i}", "x", "absent") for i in range(10)]
    found += [Difference(f"wrong{i}", "x", "y") for i in range(30)]
    table = tabulate_differences(found)
    assert [table.count(word) for word in ("wrong", "missing", "unused")] == [10, 10, 10]
    assert "… and 2 more like these" in table
    assert "… and 20 more like these" in table
    assert table.index("wrong0") < table.index("missing0") < table.index("unused0")


def test_what_one_module_misses_shares_a_row() -> None:
    own = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3)).state_dict()
    state = {"1.weight": torch.zeros(4, 2), "1.bias": torch.zeros(4), "x.a": torch.zeros(1)}
    lines = tabulate_differences(differences(state, own)).splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == [
        *("1.weight", "1.bias"),
        *("0.{weight, bias, running_mean, running_var, num_batches_tracked}", "x.a"),
    ]
    assert lines[2].endswith("absent               float32 (2,); int64 ()")


def test_checks_name_what_a_run_cannot_go_on_from() -> None:
    check_has_all({"trainer": {}, "model": {}}, "a.pth", ["trainer"])
    with pytest.raises(CheckpointError, match=r"a\.pth holds no state of ema, trainer, so the run"):
        check_has_all({"model": {}}, "a.pth", ["ema", "trainer"])
    check_is_same(nn.Linear(1, 1).state_dict(), "a.pth", Compiled(nn.Linear(1, 1)))
    with pytest.raises(CheckpointError, match=r"(?s)a\.pth is of another model.*float32 \(1, 2\)"):
        check_is_same(nn.Linear(2, 1).state_dict(), "a.pth", nn.Linear(1, 1))


def test_a_misfit_is_explained_once() -> None:
    with (
        pytest.raises(CheckpointError, match=r"^Cannot restore b from a: KeyError: 'lr'\. It was"),
        explaining_misfit("whole", "a"),
        explaining_misfit("b", "a"),
    ):
        raise KeyError("lr")


def test_weights_alone_may_hold_a_modules_extra_state() -> None:
    state = {"weight": torch.ones(1), "part._extra_state": {"count": 3}}
    assert find_weights(state, "x.pth")["model"] == state
