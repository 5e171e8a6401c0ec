"""Overrides of a LazyConfig from the command line, in hydra's grammar and with checked keys."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainkit.config.lazy_files import omegaconf
from trainkit.utils.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from omegaconf import DictConfig


def apply_override(cfg: "DictConfig", text: str) -> None:
    """Applies one override to a config, in place; see `LazyConfig.apply_overrides`.

    Raises:
        ConfigError: If it cannot be read, its key does not exist, or its value is of another kind.
    """
    parsed = _parse(text)
    key = parsed.key_or_group
    if parsed.is_sweep_override():
        raise ConfigError(f"{text!r} gives several values. Write a list as in {key}=[1,2].")
    if parsed.is_add() or parsed.is_force_add():
        omegaconf().OmegaConf.update(cfg, key, parsed.value(), force_add=True)
    elif parsed.is_delete():
        node, name = _find(cfg, key, text)
        del node[name]
    else:
        _set(cfg, key, parsed.value(), text)


def _parse(text: str) -> Any:
    try:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.core.override_parser.types import Quote, QuotedString
        from hydra.errors import HydraException
    except ImportError:
        raise ConfigError(
            "Overrides of a LazyConfig need hydra-core: pip install 'trainkit[lazy]'."
        ) from None
    key, _, value = text.partition("=")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as e:
        if not value or value[0] in "[{'\"$":
            raise ConfigError(
                f"Cannot read the override {text!r}: {str(e).splitlines()[0]}. Write key=value."
            ) from None
    # Characters that the grammar has no place for, such as another =, make it text.
    quoted = QuotedString(value, Quote.single).with_quotes()
    return OverridesParser.create().parse_override(f"{key}={quoted}")


def _find(cfg: "DictConfig", key: str, text: str) -> tuple[Any, Any]:
    """Returns the node that holds a dotted key, and its name or index there."""
    OmegaConf = omegaconf().OmegaConf  # noqa: N806  # A class.
    holder: Any
    node: Any = cfg
    name: Any = ""
    parts = key.split(".")
    for index, part in enumerate(parts):
        place = ".".join(parts[: index + 1])
        if not OmegaConf.is_config(node):
            raise ConfigError(f"{text!r}: there is no {place}, as what should hold it is {node!r}.")
        names = {str(n): n for n in (node if isinstance(node, Mapping) else range(len(node)))}
        if part not in names:
            nearest = nearest_name(part, names)
            mend = f"Its keys are: {', '.join(names)}."
            if nearest:
                mend = f"Did you mean {'.'.join([*parts[:index], nearest])}?"
            raise ConfigError(f"{text!r}: this config has no {place}. {mend} To add it: +{text}.")
        name, holder = names[part], node
        node = None if OmegaConf.is_missing(holder, name) else holder[name]
    return holder, name


def _set(cfg: "DictConfig", key: str, value: Any, text: str) -> None:
    OmegaConf = omegaconf().OmegaConf  # noqa: N806  # A class.
    node, name = _find(cfg, key, text)
    is_open = OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name)
    current = None if is_open else node[name]
    if isinstance(current, Mapping) and isinstance(value, Mapping):
        for inner, part in value.items():
            _set(cfg, f"{key}.{inner}", part, text)
        return
    kinds = _kind(current), _kind(value)
    # Quotes say that text is meant.
    is_meant = kinds[0] == "text" or text.partition("=")[2][:1] in ("'", '"')
    if kinds == ("a number", "a number"):
        # 1e4 is a whole number where one stood.
        whole = isinstance(current, int)
        if whole and value != value // 1:
            raise ConfigError(
                f"{text!r}: {key} is a whole number, {current!r}. If you mean it, write +{text}."
            )
        value = int(value) if whole else float(value)
    elif None not in kinds and kinds[0] != kinds[1] and not is_meant and "${" not in str(value):
        raise ConfigError(
            f"{text!r}: {key} is {kinds[0]}, {current!r}, but was given {kinds[1]}, {value!r}. If "
            f"you mean it, write +{text}."
        )
    node[name] = value


def _kind(value: Any) -> str | None:
    """Returns what kind of value this is; None stands in for any."""
    kinds: dict[str, Any] = {
        "a truth value": bool,
        "a number": (int, float),
        "text": str,
        "a section": Mapping,
    }
    matching = (kind for kind, types in kinds.items() if isinstance(value, types))
    return next(matching, "a list" if isinstance(value, Sequence) else None)
