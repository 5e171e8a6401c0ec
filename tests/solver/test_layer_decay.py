import math

import pytest
from torch import nn

from trainkit.config.defaults import get_cfg
from trainkit.modeling import build_model
from trainkit.solver.layer_decay import layer_decay_func
from trainkit.utils.errors import ConfigError


def depths(model: nn.Module, decay: float = 0.5) -> dict[str, int]:
    factor = layer_decay_func(model, decay)
    return {name: round(math.log(factor(name), decay)) for name, _ in model.named_parameters()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 1)
        self.cls_token = nn.Parameter(self.head.weight[0].detach().clone())


def test_a_transformers_layers_are_its_blocks_with_what_is_before_and_behind() -> None:
    found = depths(Transformer())
    assert {name.split(".mlp")[0].split(".norm")[0]: depth for name, depth in found.items()} == {
        "cls_token": 4,
        "patch_embed.weight": 4,
        "patch_embed.bias": 4,
        "blocks.0": 3,
        "blocks.1": 2,
        "blocks.2": 1,
        "norm.weight": 0,
        "norm.bias": 0,
        "head.weight": 0,
        "head.bias": 0,
    }


def test_the_image_classifiers_layers_are_stem_blocks_and_head() -> None:
    found = depths(build_model(get_cfg()))
    layers = {".".join(name.split(".")[:-1][:3]): depth for name, depth in found.items()}
    assert layers == {
        "backbone.stem.0": 4,
        "backbone.stem.1": 4,
        "backbone.stages.0": 3,
        "backbone.stages.1": 2,
        "backbone.stages.2": 1,
        "head": 0,
    }


def test_a_list_inside_a_list_is_one_layer() -> None:
    inner = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert (
        list(depths(nn.Sequential(inner, nn.ReLU(), nn.Linear(1, 1))).values()) == [1] * 4 + [0] * 2
    )


def test_shared_and_frozen_parameters_do_not_move_the_others() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    net.append(net[0])
    net[1].requires_grad_(False)
    assert depths(net) == {f"{i}.{kind}": 2 - i for i in range(3) for kind in ("weight", "bias")}


def test_a_model_may_tell_its_depths_itself() -> None:
    class Telling(nn.Linear):
        def lr_depth(self, name: str) -> int:
            return {"weight": 3, "bias": 0}[name]

    assert depths(Telling(1, 1)) == {"weight": 3, "bias": 0}


@pytest.mark.parametrize("model", [nn.Linear(1, 1), Block().norm, nn.ReLU(), Block()])
def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    if isinstance(model, Block):
        model.mlp = nn.Linear(1, 1)  # type: ignore[assignment]  # in place of the list
    message = rf"LAYER_DECAY is 0\.5, but {type(model).__name__} has no nn\.Sequential .* lr_depth"
    with pytest.raises(ConfigError, match=message):
        layer_decay_func(model, 0.5)
