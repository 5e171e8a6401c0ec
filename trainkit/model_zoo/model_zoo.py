"""The configs of the folder `configs/`, by name, and models from them; none has trained weights."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from trainkit.config.defaults import get_cfg
from trainkit.config.instantiate import instantiate
from trainkit.config.lazy import LazyConfig
from trainkit.modeling.build import build_model
from trainkit.utils.device import resolve_device
from trainkit.utils.errors import ConfigError, UnknownNameError

_HERE = Path(__file__).resolve()


def get_config_file(config_path: str) -> str:
    """Returns the path of a config, by its name below `configs/`, such as "fashion_mnist.yaml".

    Raises:
        UnknownNameError: If there is none of this name.
    """
    # Installed they lie beside this file (see setup.cfg), in a checkout at its top.
    folder = next(filter(Path.is_dir, (_HERE.with_name("configs"), _HERE.parents[2] / "configs")))
    found = (path for path in folder.rglob("*") if path.suffix in (".yaml", ".py"))
    paths = {path.relative_to(folder).as_posix(): path for path in found}
    if config_path not in paths:
        raise UnknownNameError("config", config_path, paths)
    return os.fspath(paths[config_path])


def get_config(config_path: str, trained: bool = False) -> Any:
    """Returns a config: a `CfgNode` from a .yaml file, a `DictConfig` from a .py file.

    Raises:
        UnknownNameError: If there is none of this name.
        ConfigError: If `trained` asks for weights.
    """
    path = get_config_file(config_path)
    if trained:
        raise ConfigError(
            f"No trained weights are published for {config_path}. Train it, and set MODEL.WEIGHTS "
            "to the model_final.pth of that run."
        )
    if path.endswith(".py"):
        return LazyConfig.load(path)
    cfg = get_cfg()
    cfg.merge_from_file(path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Returns the model of a config, in training mode, on a device as `MODEL.DEVICE` names it.

    Raises:
        UnknownNameError: If there is no config of this name.
        ConfigError: If `trained` asks for weights, or the device is not there.
    """
    cfg = get_config(config_path, trained)
    if config_path.endswith(".py"):
        if "model" not in cfg:
            raise ConfigError(f"{config_path} has no model: it is a part of other configs.")
        model: nn.Module = instantiate(cfg.model)
        return model.to(resolve_device(device or cfg.get("train", {}).get("device", "auto")))
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    return build_model(cfg)
