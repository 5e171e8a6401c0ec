import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainkit.config.defaults
from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg

REPOSITORY = Path(__file__).parents[2]


def leaves(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_call_returns_an_independent_config() -> None:
    changed, fresh = get_cfg(), get_cfg()
    changed.SOLVER.MAX_ITER = -1
    changed.MODEL.PIXEL_MEAN.append(1.0)
    assert fresh == get_cfg()
    assert fresh != changed
    assert not fresh.is_frozen()


def test_every_key_has_a_comment_that_covers_at_most_two_keys() -> None:
    source = Path(trainkit.config.defaults.__file__).read_text(encoding="utf-8")
    commented: list[str] = []
    uncommented: list[str] = []
    covered = 2
    for line in source.splitlines():
        if line.startswith("#"):
            covered = 0
        elif match := re.match(r"_C\.([A-Z0-9_.]+) = (?!CfgNode)", line):
            covered += 1
            (commented if covered <= 2 else uncommented).append(match[1])
        else:
            covered = 2
    assert uncommented == []
    assert sorted(commented) == sorted(leaves(get_cfg()))


def test_dumped_config_loads_as_an_equal_one(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("SOLVER.WEIGHT_DECAY_BIAS", "0.5", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "inf"),
            *("DATASETS.TRAIN", "('a', 'b')", "OUTPUT_DIR", "123: #x", "SOLVER.BASE_LR", "1e-5"),
            *("TEST.EXPECTED_RESULTS", "[['classification', 'top1', 0.9, 0.01]]"),
            *("SEED", "9223372036854775807"),
        ]
    )
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump(), encoding="utf-8")
    loaded = get_cfg()
    loaded.merge_from_file(str(path))
    assert loaded == cfg != get_cfg()
    for key in leaves(cfg):
        node, other = cfg, loaded
        for part in key.split("."):
            node, other = node[part], other[part]
        assert type(node) is type(other), key


def test_there_are_configs() -> None:
    assert list((REPOSITORY / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    sorted((REPOSITORY / "configs").rglob("*.yaml")),
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_config_file_fits_the_defaults(path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    assert sorted(leaves(cfg)) == sorted(leaves(get_cfg()))
