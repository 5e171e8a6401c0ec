import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn

from trainkit.config.configurable import configurable
from trainkit.modeling.backbone.resnet import SmallResNet
from trainkit.modeling.build import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    build_backbone,
    build_model,
)
from trainkit.modeling.meta_arch.classifier import ImageClassifier
from trainkit.utils.errors import ConfigError, UnknownNameError


@BACKBONE_REGISTRY.register()
class BackboneFromCfgAlone(nn.Module):
    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.out_channels = cfg.MODEL.NUM_CLASSES


@META_ARCH_REGISTRY.register()
class ModelWhoseFromConfigGivesArguments(nn.Module):
    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, int]:
        return {"num_classes": cfg.MODEL.NUM_CLASSES}


@META_ARCH_REGISTRY.register()
class ConfigurableModel(nn.Module):
    @configurable
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, width)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, int]:
        return {"width": cfg.MODEL.NUM_CLASSES}


def test_a_configurable_model_is_built_from_its_config(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "ConfigurableModel"
    model = build_model(cfg)
    assert isinstance(model, ConfigurableModel)
    assert model.linear.out_features == cfg.MODEL.NUM_CLASSES


def test_channels_last_is_set_on_the_weights(cfg: CfgNode) -> None:
    cfg.MODEL.CHANNELS_LAST = True
    weights = [p for p in build_model(cfg).parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_config_builds_the_classifier_it_describes(cfg: CfgNode) -> None:
    cfg.MODEL.DROPOUT = 0.25
    cfg.MODEL.LABEL_SMOOTHING = 0.1
    model = build_model(cfg)
    assert isinstance(model, ImageClassifier)
    assert isinstance(model.backbone, SmallResNet)
    assert model.backbone.out_channels == 8
    assert model.head.weight.shape == (10, 8)
    assert model.dropout.p == 0.25
    assert model.label_smoothing == 0.1
    assert model.pixel_mean.item() == pytest.approx(72.94)


def test_images_have_as_many_channels_as_the_pixel_mean(cfg: CfgNode) -> None:
    cfg.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    assert build_backbone(cfg)(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 4, 4)


def test_a_class_without_from_config_gets_the_config(cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME = "BackboneFromCfgAlone"
    assert build_backbone(cfg).out_channels == 10


def test_from_config_has_to_return_the_module(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "ModelWhoseFromConfigGivesArguments"
    with pytest.raises(TypeError, match=r"GivesArguments\.from_config returned a dict, but has to"):
        build_model(cfg)


def test_unknown_names_list_the_nearest(cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME = "SmalResNet"
    with pytest.raises(
        UnknownNameError, match=r"BACKBONE\.NAME 'SmalResNet'\. Did you mean 'Small"
    ):
        build_model(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ImageClasifier"
    with pytest.raises(
        UnknownNameError, match=r"META_ARCHITECTURE 'ImageClasifier'\. Did you mean"
    ):
        build_model(cfg)


def test_the_model_goes_to_its_device(cfg: CfgNode) -> None:
    cfg.MODEL.DEVICE = "meta"
    tensors = build_model(cfg).state_dict().values()
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_device_that_is_not_there_is_named(cfg: CfgNode) -> None:
    cfg.MODEL.DEVICE = "cuda:99"
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE is 'cuda:99'"):
        build_model(cfg)
