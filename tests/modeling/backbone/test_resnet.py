import math

import pytest
import torch
from torch import nn

from trainkit.modeling.backbone.resnet import BasicBlock, SmallResNet
from trainkit.utils.errors import ConfigError


@pytest.mark.parametrize(("size", "features"), [(28, 7), (32, 8), (27, 7)])
def test_each_stage_but_the_first_halves_the_resolution(size: int, features: int) -> None:
    net = SmallResNet(3, (4, 6, 8), (1, 2, 1))
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 8, features, features)
    assert net.out_channels == 8


def test_parameters_of_the_default_net_are_counted_by_hand() -> None:
    def block(inside: int, outside: int) -> int:
        shortcut = inside * outside + 2 * outside if inside != outside else 0
        return 9 * (inside + outside) * outside + 4 * outside + shortcut

    expected = 9 * 16 + 2 * 16 + 2 * block(16, 16)
    expected += block(16, 32) + block(32, 32) + block(32, 64) + block(64, 64)
    net = SmallResNet(1, (16, 32, 64), (2, 2, 2))
    assert sum(p.numel() for p in net.parameters()) == expected


def test_a_first_stage_without_blocks_is_left_to_the_stem() -> None:
    net = SmallResNet(1, (4, 8, 16), (0, 1, 1))
    assert len(net.stages) == 2
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 16, 7, 7)


def test_blocks_start_as_identities() -> None:
    x = torch.rand(2, 4, 5, 5)
    net = SmallResNet(1, (4,), (3,))
    torch.testing.assert_close(net.stages(x), x)


def test_convolutions_start_by_fan_out() -> None:
    net = SmallResNet(1, (64, 64), (1, 1))
    block = net.stages[1]
    assert isinstance(block, BasicBlock)
    # 36,864 weights: the standard error of their deviation is 0.4 percent.
    assert block.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert isinstance(block.shortcut[0], nn.Conv2d)
    assert block.shortcut[0].weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.06)


@pytest.mark.parametrize(("widths", "blocks"), [((), ()), ((4, 8), (1,))])
def test_stages_need_both_a_width_and_a_number_of_blocks(
    widths: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"WIDTHS is \(.*\) and MODEL\.BACKBONE\.BLOCKS is \("):
        SmallResNet(1, widths, blocks)
