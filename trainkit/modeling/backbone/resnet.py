"""A residual net for small images.

He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385): the nets of sec. 4.2,
with the projection shortcuts (option B) of sec. 3.3.
"""

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import nn

from trainkit.modeling.build import BACKBONE_REGISTRY
from trainkit.utils.errors import ConfigError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution; the output is that much smaller, rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


@BACKBONE_REGISTRY.register()
class SmallResNet(nn.Module):
    """A 3x3 stem and stages of basic blocks, each stage but the first at half the resolution.

    Convolutions start as in He et al. (arXiv:1502.01852), sec. 2.2, by fan-out. The last norm of
    each block starts at 0, so that blocks start as identities (Goyal et al., arXiv:1706.02677,
    sec. 5.1).

    Args:
        in_channels: Channels of the images.
        widths: Channels of each stage.
        blocks: Number of blocks of each stage; 0 in the first leaves it to the stem, which saves
            the most expensive convolutions.

    Attributes:
        out_channels: Channels of the feature map, which are the last stage's.

    Raises:
        ConfigError: If `widths` and `blocks` differ in length or are empty.

    Example:
        >>> SmallResNet(1, (16, 32), (1, 1))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 32, 14, 14])
    """

    def __init__(self, in_channels: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        if not widths or len(widths) != len(blocks):
            raise ConfigError(
                f"MODEL.BACKBONE.WIDTHS is {tuple(widths)} and MODEL.BACKBONE.BLOCKS is "
                f"{tuple(blocks)}, but both need one number for each stage."
            )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stages = nn.Sequential()
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                self.stages.append(BasicBlock(channels, width, stride))
                channels = width
        self.out_channels = channels
        self._init_weights()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "SmallResNet":
        """Builds what `MODEL.BACKBONE` describes, for as many channels as `PIXEL_MEAN` has."""
        backbone = cfg.MODEL.BACKBONE
        return cls(len(cfg.MODEL.PIXEL_MEAN), backbone.WIDTHS, backbone.BLOCKS)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps normalized images (N, in_channels, H, W) to features (N, out_channels, h, w)."""
        features: torch.Tensor = self.stages(self.stem(x))
        return features
