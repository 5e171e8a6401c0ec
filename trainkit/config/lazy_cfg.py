"""What a `DefaultTrainer` takes from a LazyConfig: keys of a `CfgNode`, and noted calls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from trainkit.config.config import CfgNode, _merge
from trainkit.config.defaults import get_cfg
from trainkit.config.instantiate import build
from trainkit.config.lazy import LazyConfig, to_plain
from trainkit.utils.env import setup_environment
from trainkit.utils.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")

# All other names in `train` are those of keys, in small letters.
_TRAIN_KEYS = {
    "init_checkpoint": "MODEL.WEIGHTS",
    "device": "MODEL.DEVICE",
    "max_iter": "SOLVER.MAX_ITER",
    "amp.enabled": "SOLVER.AMP.ENABLED",
    "checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "checkpointer.max_to_keep": "CHECKPOINT.MAX_TO_KEEP",
    "eval_period": "TEST.EVAL_PERIOD",
    "best_metric": "TEST.BEST_METRIC",
}
_PARTS = ("model", "optimizer", "lr_multiplier", "dataloader")


def load_cfg(filename: str, opts: Sequence[Any] = ()) -> CfgNode:
    """Returns the default config, overwritten by a config file and by a command line.

    Args:
        filename: A `.yaml` file, a `.py` file as `cfg_from_lazy` takes it, or "".
        opts: KEY VALUE pairs of a `CfgNode`; for a `.py` file also overrides such as
            `train.max_iter=100`, which come first.

    Raises:
        ConfigError: If a file cannot be read, or a key or a value does not fit.
    """
    setup_environment()
    words = [str(opt) for opt in opts]
    if not filename.partition("#")[0].endswith(".py"):
        cfg = get_cfg()
        try:
            if filename:
                cfg.merge_from_file(filename)
        except ConfigError as e:
            if "LAZY is not a config key" not in str(e):
                raise
            raise ConfigError(
                f"{filename} is of a run that a .py config describes, with calls that YAML must "
                "not make. Give that .py config."
            ) from None
        cfg.merge_from_list(words)
        return cfg
    overrides, pairs = [], []
    while words:
        if "=" in words[0]:
            overrides.append(words.pop(0))
        else:
            pairs += words[:2]
            del words[:2]
    cfg = cfg_from_lazy(LazyConfig.apply_overrides(LazyConfig.load(filename), overrides))
    cfg.merge_from_list(pairs)
    return cfg


def cfg_from_lazy(lazy: "DictConfig") -> CfgNode:
    """Returns the config that a `DefaultTrainer` reads, from one for the flat script.

    `train` sets the keys that correspond, and names in capitals (`SOLVER = dict(…)`, `SEED = 1`)
    those of a `CfgNode`. The calls that `model`, `optimizer` (its `params.model` is filled in),
    `lr_multiplier`, `dataloader.train`, `dataloader.test` and `dataloader.evaluator` note are kept
    below LAZY. They are made in place of what the keys would build, which then have no effect.

    Raises:
        ConfigError: If a key is unknown or its value does not fit, or a call cannot be kept because
            something in it has no name that leads to it.
    """
    cfg = settings_of(lazy, strict=True)
    parts = {}
    for name, value in to_plain(lazy, resolve=True).items():
        if name in _PARTS:
            parts[name] = value
        elif name.isupper():
            _merge(cfg, {name: value}, (), lambda path: "The .py config")
        elif name != "train" and (nearest := nearest_name(name, (*_PARTS, "train"))):
            raise ConfigError(f"This config has a {name!r}. Did you mean {nearest!r}?")
    if "dataloader" in parts and "DATASETS" not in lazy:
        cfg.DATASETS.TEST = ("test",) if "test" in parts["dataloader"] else ()
    if parts:
        cfg.LAZY = CfgNode(parts)
    return cfg


def settings_of(lazy: "DictConfig", strict: bool = False) -> CfgNode:
    """Returns the default config with the keys that `train` of a LazyConfig sets.

    Args:
        lazy: The config.
        strict: Whether a name in `train` that corresponds to no key is an error.

    Raises:
        ConfigError: If it is, or a value does not fit.
    """
    cfg = get_cfg()
    known = {key.lower(): key for key, _ in _leaves(cfg)} | _TRAIN_KEYS
    train = to_plain(lazy.train, resolve=True) if "train" in lazy else {}
    for name, value in _leaves(train):
        if name in known:
            nested: Any = value
            for part in reversed(known[name].split(".")):
                nested = {part: nested}
            _merge(cfg, nested, (), lambda path, name=name: f"train.{name}")
        elif strict:
            nearest = nearest_name(name, known) or ", ".join(_TRAIN_KEYS)
            raise ConfigError(f"train.{name} sets nothing. Did you mean train.{nearest}?")
    return cfg


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def build_part(cfg: CfgNode, name: str, default: Callable[[], T], **more: Any) -> T:
    """Makes the call that a `.py` config notes for a part of a run.

    Args:
        cfg: The config.
        name: Of the part, such as "dataloader.train".
        default: Makes the part where the config notes no call.
        more: Further arguments of the call; a dict is added to the argument of that name.

    Raises:
        ConfigError, RuntimeError: As `instantiate`.
    """
    node: Any = cfg.get("LAZY")
    for key in name.split("."):
        node = (node or {}).get(key)
    if node is None:
        return default()
    merged = {k: {**node.get(k, {}), **v} if isinstance(v, dict) else v for k, v in more.items()}
    part: T = build({**node, **merged}, name)
    return part
