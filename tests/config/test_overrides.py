import sys
from typing import Any

import pytest
from omegaconf import DictConfig

from trainkit.config.lazy import LazyConfig
from trainkit.config.lazy_files import lazy_dict
from trainkit.config.overrides import apply_override
from trainkit.utils.errors import ConfigError


@pytest.fixture
def cfg() -> DictConfig:
    return lazy_dict(
        {
            "train": {"max_iter": 10, "output_dir": "out", "amp": {"enabled": False}, "best": None},
            "optimizer": {
                "_target_": print,
                "lr": 0.1,
                "betas": [0.9, 0.99],
                "n": "${train.max_iter}",
            },
            "blocks": [{"width": 4}],
        }
    )


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_iter=20", "train.max_iter", 20),
        ("train.max_iter=1e4", "train.max_iter", 10000),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("train.amp.enabled=true", "train.amp.enabled", True),
        ("train.amp={enabled: true}", "train.amp.enabled", True),
        ("train.output_dir=123", "train.output_dir", 123),
        ('train.max_iter="123"', "train.max_iter", "123"),
        ("train.max_iter=${optimizer.lr}", "train.max_iter", 0.1),
        ("train.output_dir=a/b-c_1.5", "train.output_dir", "a/b-c_1.5"),
        ("train.best=top1", "train.best", "top1"),
        ("train.best=null", "train.best", None),
        ("train.amp=null", "train.amp", None),
        ("optimizer.betas=[0.8,0.9]", "optimizer.betas", [0.8, 0.9]),
        ("optimizer.betas.0=0.7", "optimizer.betas", [0.7, 0.99]),
        ("blocks.0.width=8", "blocks", [{"width": 8}]),
        ("optimizer._target_=torch.optim.Adam", "optimizer._target_", "torch.optim.Adam"),
        ("optimizer.lr='${train.max_iter}'", "optimizer.lr", 10),
        ("optimizer.n=3", "optimizer.n", 3),
        ("+train.note=x", "train.note", "x"),
        ("+new.deep.key=[1]", "new.deep.key", [1]),
        ("++train.max_iter=many", "train.max_iter", "many"),
        ("+train.max_iter=20", "train.max_iter", 20),
    ],
)
def test_an_override_changes_what_it_names(
    cfg: DictConfig, override: str, key: str, value: Any
) -> None:
    apply_override(cfg, override)
    found: Any = cfg
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value) or isinstance(value, list)


@pytest.mark.parametrize("text", ["a=b=c", "https://host/x?a=1", "=="])
def test_d39_a_value_may_hold_equals_signs(cfg: DictConfig, text: str) -> None:
    apply_override(cfg, f"train.output_dir='{text}'")
    assert cfg.train.output_dir == text
    apply_override(cfg, f"train.output_dir=({text}#'x")
    assert cfg.train.output_dir == f"({text}#'x"


def test_a_key_is_removed(cfg: DictConfig) -> None:
    apply_override(cfg, "~train.amp")
    assert "amp" not in cfg.train


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_itr=20", r"no train\.max_itr\. Did you mean train\.max_iter\?.*\+train"),
        ("trian.max_iter=20", r"no trian\. Did you mean train\?"),
        ("train.amp={enable: true}", r"no train\.amp\.enable\. .*train\.amp\.enabled\?"),
        ("zzz=1", "no zzz. Its keys are: train, optimizer, blocks"),
        ("blocks.3.width=1", r"no blocks\.3\. Its keys are: 0"),
        ("~train.zzz", r"no train\.zzz"),
        ("train.max_iter.x=1", r"there is no train\.max_iter\.x, as what should hold it is 10"),
    ],
)
def test_d39_an_unknown_key_is_an_error_with_the_nearest_one(
    cfg: DictConfig, override: str, message: str
) -> None:
    before = cfg.copy()
    with pytest.raises(ConfigError, match=message):
        apply_override(cfg, override)
    assert cfg == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iter=many", r"train\.max_iter is a number, 10, but was given text, 'many'"),
        (
            "train.amp.enabled=1",
            r"is a truth value, False, but was given a number, 1\..* write \+train",
        ),
        ("train.amp=on", r"train\.amp is a section"),
        ("optimizer.betas=0.9", r"optimizer\.betas is a list, \[0\.9, 0\.99\], but"),
        ("train.max_iter", "Cannot read the override 'train.max_iter': .*Write key=value"),
        ("optimizer.betas=[1,2", "Cannot read the override .*Write key=value"),
        ("optimizer.lr=0.1,0.2", "gives several values. Write a list"),
        ("train.max_iter=choice(1,2)", "gives several values"),
    ],
)
def test_a_value_that_does_not_fit_is_named(cfg: DictConfig, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_override(cfg, override)


def test_a_missing_hydra_is_named_with_the_mend(
    cfg: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hydra.core.override_parser.overrides_parser", None)
    with pytest.raises(ConfigError, match=r"hydra-core: pip install 'trainkit\[lazy\]'"):
        apply_override(cfg, "train.max_iter=3")


@pytest.mark.parametrize("value", ["0.5", "inf", "nan"])
def test_a_whole_number_stays_one(value: str) -> None:
    cfg = lazy_dict({"train": {"max_iter": 10}})
    with pytest.raises(ConfigError, match=r"train.max_iter is a whole number, 10.*write \+train"):
        LazyConfig.apply_overrides(cfg, [f"train.max_iter={value}"])


def test_an_option_among_the_overrides_is_told() -> None:
    with pytest.raises(ConfigError, match="--resume stands among the overrides"):
        LazyConfig.apply_overrides(lazy_dict({"a": 1}), ["--resume"])
