"""Backbones: from an image to a feature map."""

from trainkit.modeling.backbone.resnet import SmallResNet

__all__ = ["SmallResNet"]
