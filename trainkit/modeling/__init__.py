"""Models by name: the registries, what builds from them, and the image classifier."""

from trainkit.modeling.backbone.resnet import SmallResNet
from trainkit.modeling.build import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    build_backbone,
    build_model,
)
from trainkit.modeling.meta_arch.classifier import ImageClassifier

__all__ = [
    "BACKBONE_REGISTRY",
    "META_ARCH_REGISTRY",
    "ImageClassifier",
    "SmallResNet",
    "build_backbone",
    "build_model",
]
