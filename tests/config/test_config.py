import copy
import math
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from iopath.common.file_io import PathHandler

from tests.web import serving
from trainkit.config.config import CfgNode, global_cfg, set_global_cfg
from trainkit.utils.errors import ConfigError
from trainkit.utils.file_io import PathManager

WriteYaml = Callable[[str, str], str]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def cfg() -> CfgNode:
    return CfgNode(
        {
            "OUTPUT_DIR": "./output",
            "SOLVER": {"MAX_ITER": 100, "BASE_LR": 0.1, "NESTEROV": False, "STEPS": (1, 2)},
            "MODEL": {"PIXEL_MEAN": [1.0], "BIAS": None, "HEAD": {"WIDTH": 8}},
        }
    )


def test_file_overwrites_what_it_names(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    cfg.merge_from_file(write_yaml("a.yaml", "SOLVER: {MAX_ITER: 7}\nMODEL: {HEAD: {WIDTH: 9}}"))
    assert (cfg.SOLVER.MAX_ITER, cfg.MODEL.HEAD.WIDTH) == (7, 9)
    assert cfg.SOLVER.BASE_LR == 0.1


def test_file_may_be_a_path_object(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    cfg.merge_from_file(Path(write_yaml("a.yaml", "SOLVER: {MAX_ITER: 7}")))  # type: ignore[arg-type]  # detectron2's signature says str
    assert cfg.SOLVER.MAX_ITER == 7


def test_list_overwrites_what_it_names(cfg: CfgNode) -> None:
    cfg.merge_from_list(["SOLVER.MAX_ITER", "7", "MODEL.HEAD.WIDTH", 9, "OUTPUT_DIR", "x"])
    assert (cfg.SOLVER.MAX_ITER, cfg.MODEL.HEAD.WIDTH, cfg.OUTPUT_DIR) == (7, 9, "x")
    cfg.merge_from_list([])


# Types.


@pytest.mark.parametrize(
    ("key", "word", "expected"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.BASE_LR", "inf", math.inf),
        ("SOLVER.NESTEROV", "True", True),
        ("SOLVER.STEPS", "[3, 4]", (3, 4)),
        ("SOLVER.STEPS", "(3,)", (3,)),
        ("MODEL.PIXEL_MEAN", "(2.0, 3.0)", [2.0, 3.0]),
        ("MODEL.BIAS", "0.5", 0.5),
        ("MODEL.BIAS", "None", None),
        ("OUTPUT_DIR", "123", "123"),
        ("OUTPUT_DIR", "None", "None"),
        ("OUTPUT_DIR", "a b/(c)", "a b/(c)"),
        ("OUTPUT_DIR", "", ""),
    ],
)
def test_words_of_a_command_line_take_the_type_of_the_key(
    cfg: CfgNode, key: str, word: str, expected: object
) -> None:
    cfg.merge_from_list([key, word])
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    assert node == expected
    assert type(node) is type(expected)


def test_values_of_a_file_take_the_type_of_the_key(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    text = "SOLVER: {BASE_LR: 1, STEPS: [3, 4]}\nMODEL: {PIXEL_MEAN: [1, 2], BIAS: 1e-3}"
    cfg.merge_from_file(write_yaml("a.yaml", text))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (1.0, (3, 4))
    assert type(cfg.SOLVER.BASE_LR) is float
    # YAML itself takes 1e-3, without a point, for a string.
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.BIAS) == ([1, 2], 0.001)
    cfg.merge_from_file(write_yaml("b.yaml", "SOLVER: {BASE_LR: .inf}"))
    assert math.isinf(cfg.SOLVER.BASE_LR)
    cfg.merge_from_file(write_yaml("c.yaml", "SOLVER: {BASE_LR: inf}"))
    assert math.isinf(cfg.SOLVER.BASE_LR)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("SOLVER: {MAX_ITER: 0.5}", "SOLVER.MAX_ITER is 0.5, of type float, but must be of type "
         "int, like 100"),
        ("SOLVER: {MAX_ITER: true}", "SOLVER.MAX_ITER is True, of type bool, .* int"),
        ("SOLVER: {NESTEROV: 1}", "SOLVER.NESTEROV is 1, of type int, .* bool"),
        ("SOLVER: {BASE_LR: true}", "SOLVER.BASE_LR is True, of type bool, .* float"),
        ("SOLVER: {BASE_LR: fast}", "SOLVER.BASE_LR is 'fast', of type str, .* float"),
        ("SOLVER: {BASE_LR: null}", "SOLVER.BASE_LR is None, of type NoneType, .* float"),
        ("SOLVER: {STEPS: 5}", r"SOLVER.STEPS is 5, of type int, .* tuple, like \(1, 2\)"),
        ("OUTPUT_DIR: 123", "OUTPUT_DIR is 123, of type int, .* str"),
        ("MODEL: {HEAD: 3}", "MODEL.HEAD is a section with the keys WIDTH, but was given .* 3"),
        ("SOLVER:", "SOLVER is a section with the keys MAX_ITER, .* was given the value None"),
        ("SOLVER: {MAX_ITER: {A: 1}}", "SOLVER.MAX_ITER is {'A': 1}, of type dict, .* type int"),
    ],
)  # fmt: skip
def test_value_of_another_type_names_file_key_and_type(
    cfg: CfgNode, write_yaml: WriteYaml, text: str, error: str
) -> None:
    path = write_yaml("a.yaml", text)
    with pytest.raises(ConfigError, match=f"a.yaml: {error}") as raised:
        cfg.merge_from_file(path)
    assert path in str(raised.value)


def test_value_of_another_type_on_the_command_line_says_so(cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match=r"^command line: SOLVER.MAX_ITER is 'many', of type str"):
        cfg.merge_from_list(["SOLVER.MAX_ITER", "many"])
    with pytest.raises(ConfigError, match=r"^command line: SOLVER is a section"):
        cfg.merge_from_list(["SOLVER", "5"])
    with pytest.raises(ConfigError, match=r"^command line: SOLVER.MAX_ITER is {'DEEPER': '5'}"):
        cfg.merge_from_list(["SOLVER.MAX_ITER.DEEPER", "5"])


# Keys.


def test_unknown_key_of_a_file_names_the_file_and_the_nearest_key(
    cfg: CfgNode, write_yaml: WriteYaml
) -> None:
    path = write_yaml("a.yaml", "SOLVER: {MAX_ITERS: 5}")
    with pytest.raises(
        ConfigError, match=r"a.yaml: SOLVER.MAX_ITERS is not a config key. Did you mean SOLVER.MAX_"
    ):
        cfg.merge_from_file(path)


def test_unknown_section_names_the_nearest_one(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    with pytest.raises(ConfigError, match=r"SOLVR is not a config key. Did you mean SOLVER\?"):
        cfg.merge_from_file(write_yaml("a.yaml", "SOLVR: {MAX_ITER: 5}"))


def test_unknown_key_far_from_all_lists_those_of_its_section(cfg: CfgNode) -> None:
    with pytest.raises(
        ConfigError, match=r"^command line: MODEL.Q is not a config key. Known here: BIAS, HEAD, PI"
    ):
        cfg.merge_from_list(["MODEL.Q", "5"])


@pytest.mark.parametrize("key", ["", ".", "SOLVER.", "SOLVER..MAX_ITER", "_BASE_"])
def test_odd_words_for_a_key_are_unknown_keys(cfg: CfgNode, key: str) -> None:
    with pytest.raises(ConfigError, match="is not a config key"):
        cfg.merge_from_list([key, "5"])


def test_key_that_is_a_number_is_an_unknown_key(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    with pytest.raises(ConfigError, match=r"a.yaml: 5 is not a config key"):
        cfg.merge_from_file(write_yaml("a.yaml", "5: 6"))


@pytest.mark.parametrize(
    "words",
    [
        ["SOLVER.MAX_ITER", "500", "--resume"],
        ["--resume", "SOLVER.MAX_ITER", "500"],
        ["SOLVER.MAX_ITER", "500", "--resume", "2"],
        ["SOLVER.MAX_ITER", "--resume"],
    ],
)
def test_option_among_the_settings_is_sent_before_them(cfg: CfgNode, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="Options such as --resume go before the settings"):
        cfg.merge_from_list(words)
    assert cfg.SOLVER.MAX_ITER == 100


def test_negative_numbers_are_no_options(cfg: CfgNode) -> None:
    cfg.merge_from_list(["SOLVER.MAX_ITER", "-5"])
    assert cfg.SOLVER.MAX_ITER == -5


def test_odd_list_names_its_last_word(cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match=r"3 words were given, the last one 'OUTPUT_DIR'"):
        cfg.merge_from_list(["SOLVER.MAX_ITER", "5", "OUTPUT_DIR"])
    with pytest.raises(ConfigError, match=r"1 words .* 'SOLVER.MAX_ITER=5'.*SOLVER.MAX_ITER 100"):
        cfg.merge_from_list(["SOLVER.MAX_ITER=5"])


def test_node_that_allows_new_keys_takes_them(write_yaml: WriteYaml) -> None:
    cfg = CfgNode({"A": 1}, new_allowed=True)
    cfg.merge_from_file(write_yaml("a.yaml", "B: 2\nC: {D: 3}"))
    assert (cfg.B, cfg.C.D) == (2, 3)
    assert type(cfg.C) is CfgNode


# Bases.


def test_bases_are_found_beside_the_file_that_names_them(
    cfg: CfgNode, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_yaml("base/root.yaml", "SOLVER: {MAX_ITER: 1, BASE_LR: 1.0, STEPS: [1]}")
    write_yaml("base/mid.yaml", "_BASE_: root.yaml\nSOLVER: {MAX_ITER: 2, BASE_LR: 2.0}")
    write_yaml("runs/a.yaml", "_BASE_: ../base/mid.yaml\nSOLVER: {MAX_ITER: 3}")
    monkeypatch.chdir(tmp_path)
    cfg.merge_from_file("runs/a.yaml")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (3, 2.0, (1,))


def test_of_several_bases_the_later_one_wins(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    write_yaml("one.yaml", "SOLVER: {MAX_ITER: 1, BASE_LR: 1.0, STEPS: [1]}")
    two = write_yaml("two.yaml", "SOLVER: {MAX_ITER: 2, BASE_LR: 2.0}")
    cfg.merge_from_file(write_yaml("a.yaml", f"_BASE_: [one.yaml, {two}]\nSOLVER: {{MAX_ITER: 3}}"))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (3, 2.0, (1,))


def test_base_may_be_in_the_home_folder(
    cfg: CfgNode, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_yaml("home/base.yaml", "SOLVER: {MAX_ITER: 1, TYPO: 2}")
    path = write_yaml("a.yaml", "_BASE_: ~/base.yaml")
    with pytest.raises(ConfigError, match=f"^{tmp_path}/home/base.yaml: SOLVER.TYPO"):
        cfg.merge_from_file(path)


@pytest.mark.parametrize("where", ["one", "two", "deep", "a"])
def test_error_names_the_base_that_has_the_fault(
    cfg: CfgNode, write_yaml: WriteYaml, where: str, tmp_path: Path
) -> None:
    typo = {where: "SOLVER: {TYPO: 1, MAX_ITER: 5}"}
    write_yaml("one.yaml", typo.get("one", "SOLVER: {MAX_ITER: 1}"))
    write_yaml("sub/deep.yaml", typo.get("deep", "SOLVER: {MAX_ITER: 2}"))
    write_yaml("two.yaml", "_BASE_: sub/deep.yaml\n" + typo.get("two", "OUTPUT_DIR: x"))
    path = write_yaml("a.yaml", "_BASE_: [one.yaml, two.yaml]\n" + typo.get("a", ""))
    faulty = tmp_path / ("sub/deep.yaml" if where == "deep" else f"{where}.yaml")
    with pytest.raises(ConfigError, match=f"^{faulty}: SOLVER.TYPO is not a config key"):
        cfg.merge_from_file(path)


def test_error_names_the_base_whose_value_counts(
    cfg: CfgNode, write_yaml: WriteYaml, tmp_path: Path
) -> None:
    write_yaml("one.yaml", "SOLVER: {MAX_ITER: 1}")
    write_yaml("two.yaml", "SOLVER: {MAX_ITER: many}")
    path = write_yaml("a.yaml", "_BASE_: [one.yaml, two.yaml]")
    with pytest.raises(ConfigError, match=f"^{tmp_path}/two.yaml: SOLVER.MAX_ITER is 'many'"):
        cfg.merge_from_file(path)


def test_missing_base_is_named(cfg: CfgNode, write_yaml: WriteYaml, tmp_path: Path) -> None:
    path = write_yaml("a.yaml", "_BASE_: nowhere.yaml")
    with pytest.raises(ConfigError, match=f"Cannot read the config file '{tmp_path}/nowhere.yaml'"):
        cfg.merge_from_file(path)


@pytest.mark.parametrize("base", ["5", "null", "[5]", "{a: b}"])
def test_base_that_is_no_path_is_refused(cfg: CfgNode, write_yaml: WriteYaml, base: str) -> None:
    path = write_yaml("a.yaml", f"_BASE_: {base}")
    with pytest.raises(ConfigError, match=r"a.yaml: _BASE_ is .*, but must be a path or a list"):
        cfg.merge_from_file(path)


def test_bases_in_a_circle_are_refused(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    write_yaml("b.yaml", "_BASE_: a.yaml")
    path = write_yaml("a.yaml", "_BASE_: b.yaml")
    with pytest.raises(ConfigError, match=r"\.yaml: its _BASE_ leads back to itself"):
        cfg.merge_from_file(path)


def test_section_over_a_value_of_the_base_is_refused(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    write_yaml("b.yaml", "SOLVER: 5")
    path = write_yaml("a.yaml", "_BASE_: b.yaml\nSOLVER: {MAX_ITER: 5}")
    with pytest.raises(ConfigError, match=r"a.yaml: SOLVER is a section here and a value"):
        cfg.merge_from_file(path)


def test_files_at_other_addresses_are_read_through_the_path_manager(
    cfg: CfgNode, write_yaml: WriteYaml, tmp_path: Path
) -> None:
    class Handler(PathHandler):  # type: ignore[misc]  # iopath is untyped
        def _get_supported_prefixes(self) -> list[str]:
            return ["test-config://"]

        def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
            return open(tmp_path / path.removeprefix("test-config://"), mode)

    write_yaml("run/base.yaml", "SOLVER: {MAX_ITER: 5, BASE_LR: slow}")
    write_yaml("run/a.yaml", "_BASE_: base.yaml")
    handler = Handler()
    PathManager.register_handler(handler)
    try:
        with pytest.raises(
            ConfigError, match=r"^test-config://run/base.yaml: SOLVER.BASE_LR is 'slow'"
        ):
            cfg.merge_from_file("test-config://run/a.yaml")
    finally:
        del PathManager._path_handlers["test-config://"]
    assert cfg.SOLVER.MAX_ITER == 5


# Files.


def test_missing_file_says_where_it_was_looked_for(cfg: CfgNode) -> None:
    with pytest.raises(
        ConfigError, match=r"Cannot read the config file 'nowhere.yaml': No such file"
    ) as raised:
        cfg.merge_from_file("nowhere.yaml")
    assert os.getcwd() in str(raised.value)


def test_folder_is_no_config_file(cfg: CfgNode, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the config file .*: Is a directory"):
        cfg.merge_from_file(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "empty"), ("# only a comment\n", "empty"), ("- 1\n- 2", "a list"), ("hello", "a str")],
)
def test_file_without_sections_is_refused(
    cfg: CfgNode, write_yaml: WriteYaml, text: str, found: str
) -> None:
    path = write_yaml("a.yaml", text)
    with pytest.raises(ConfigError, match=f"a.yaml' is {found}; it must hold sections and keys"):
        cfg.merge_from_file(path)


@pytest.mark.parametrize("text", ["a: b: c", "a: [1", "\tx: 1", "x: \x00", "VERSION: 2026-13-01"])
def test_file_that_is_not_yaml_is_refused(cfg: CfgNode, write_yaml: WriteYaml, text: str) -> None:
    path = write_yaml("a.yaml", text)
    with pytest.raises(ConfigError, match=r"a.yaml is not valid YAML: "):
        cfg.merge_from_file(path)


def test_binary_file_is_refused(cfg: CfgNode, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x81")
    with pytest.raises(ConfigError, match=r"a.yaml is not valid YAML: "):
        cfg.merge_from_file(str(path))


@pytest.mark.parametrize("in_base", [False, True])
@pytest.mark.parametrize("allow_unsafe", [False, True])
@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [{canary}]",
        "!!python/object/new:os.mkdir [{canary}]",
        "!!python/name:os.system",
        "!!python/tuple [1, 2]",
    ],
)
def test_f23_tag_that_would_run_code_is_refused_and_does_not_run(
    cfg: CfgNode,
    write_yaml: WriteYaml,
    tmp_path: Path,
    tag: str,
    allow_unsafe: bool,
    in_base: bool,
) -> None:
    canary = tmp_path / "canary"
    path = write_yaml("evil.yaml", "OUTPUT_DIR: " + tag.format(canary=canary))
    if in_base:
        path = write_yaml("a.yaml", "_BASE_: evil.yaml")
    with pytest.raises(
        ConfigError, match=r"evil.yaml: .*(?s:.*)tags that build Python objects are refused"
    ):
        cfg.merge_from_file(path, allow_unsafe=allow_unsafe)
    assert not canary.exists()


@pytest.mark.parametrize("unsafe", [{}, {"allow_unsafe": True}])
def test_d38_yaml_is_read_safely_whatever_is_asked_for(
    write_yaml: WriteYaml, tmp_path: Path, unsafe: dict[str, bool]
) -> None:
    canary = tmp_path / "canary"
    path = write_yaml("a.yaml", f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{canary}]")
    with pytest.raises(ConfigError, match="refused, since they can run code"):
        CfgNode.load_yaml_with_base(path, **unsafe)
    assert not canary.exists()


def test_a_file_on_the_web_is_read_by_its_hash(
    cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "web", monkeypatch) as web:
        (web.folder / "base.yaml").write_text("SOLVER: {MAX_ITER: 5, BASE_LR: 0.5}")
        base = web.with_hash("base.yaml").removeprefix(f"{web.address}/")
        (web.folder / "a.yaml").write_text(f"_BASE_: {base}\nSOLVER: {{MAX_ITER: 7}}")
        cfg.merge_from_file(web.with_hash("a.yaml"))
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 0.5)
        assert web.requests == ["/a.yaml", "/base.yaml"]


def test_f23_a_file_on_the_web_without_its_hash_is_not_fetched(
    cfg: CfgNode, write_yaml: WriteYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "web", monkeypatch) as web:
        (web.folder / "base.yaml").write_text("SOLVER: {MAX_ITER: 5}")
        (web.folder / "a.yaml").write_text("_BASE_: base.yaml")
        local = write_yaml("b.yaml", f"_BASE_: {web.address}/base.yaml")
        for name in (f"{web.address}/base.yaml", web.with_hash("a.yaml"), local):
            with pytest.raises(ConfigError, match=r"base\.yaml' is on the web.*Append #sha256="):
                cfg.merge_from_file(name)
        with pytest.raises(ConfigError, match="has the SHA-256"):
            cfg.merge_from_file(f"{web.address}/base.yaml#sha256={'0' * 64}")
        assert web.requests == ["/a.yaml", "/base.yaml"]
    assert cfg.SOLVER.MAX_ITER == 100


# What grows when it is read.


def laughs(item: str, repeat: str, top: str) -> str:
    """The "billion laughs": each of ten lines stands for ten times the line before."""
    lines = [f"X0: &x0 {item}"]
    lines += [f"X{i}: &x{i} {repeat.format(*[f'*x{i - 1}'] * 10)}" for i in range(1, 10)]
    return "\n".join([*lines, top])


@pytest.mark.parametrize(
    "text",
    [
        laughs("lol", "[{}, {}, {}, {}, {}, {}, {}, {}, {}, {}]", "OUTPUT_DIR: *x9"),
        laughs("{a: 1}", "{{a: {}, b: {}, c: {}, d: {}, e: {}, f: {}, g: {}}}", "SOLVER: *x9"),
        laughs("{a: 1}", "{{<<: [{}, {}, {}, {}, {}, {}, {}]}}", "SOLVER: *x9"),
        f"A: &a {'x' * 2000}\nB: [{'*a, ' * 2000}]",
        "SOLVER: &a [*a]",
        "SOLVER: &a {b: *a}",
        "x" * 300_000,
        "OUTPUT_DIR: " + "[" * 60 + "]" * 60,
        "OUTPUT_DIR: " + "[" * 5000,
        "\n".join(f"X{i}: &x{i} [{f'*x{i - 1}' if i else ''}]" for i in range(100)),
        "SEED: 1" + ":0" * 20_000,
        "SEED: " + "9" * 100_000,
        "SEED: 0x" + "f" * 100_000,
        "0x" + "f" * 100_000 + ": 1",
    ],
)
def test_f23_a_file_that_grows_when_it_is_read_is_refused_at_once(
    cfg: CfgNode, write_yaml: WriteYaml, text: str
) -> None:
    path = write_yaml("a.yaml", text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"a\.yaml is not valid YAML: ") as raised:
        cfg.merge_from_file(path)
    assert len(str(raised.value)) < 1000
    assert time.process_time() - start < 3


def test_aliases_of_modest_size_are_taken(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    text = "SOLVER: &s {STEPS: &steps [3, 4]}\nMODEL: {PIXEL_MEAN: *steps}"
    cfg.merge_from_file(write_yaml("a.yaml", text))
    assert (cfg.SOLVER.STEPS, cfg.MODEL.PIXEL_MEAN) == ((3, 4), [3, 4])
    node = CfgNode({"A": {"X": 1}, "B": {"X": 1}})
    # What a later file says of one section does not reach another that was its alias.
    write_yaml("base.yaml", "A: &a {X: 2}\nB: *a")
    node.merge_from_file(write_yaml("b.yaml", "_BASE_: base.yaml\nA: {X: 3}"))
    assert (node.A.X, node.B.X) == (3, 2)


def test_f23_bases_that_multiply_are_refused(
    cfg: CfgNode, write_yaml: WriteYaml, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_cfg = CfgNode._open_cfg

    def noting(name: str) -> IO[str]:
        opened.append(name)
        return open_cfg(name)

    monkeypatch.setattr(CfgNode, "_open_cfg", noting)
    write_yaml("x0.yaml", "SOLVER: {MAX_ITER: 5}")
    for i in range(1, 20):
        path = write_yaml(f"x{i}.yaml", f"_BASE_: [{f'x{i - 1}.yaml, ' * 10}]")
    with pytest.raises(ConfigError, match=r"x\d+\.yaml: its _BASE_ leads back .* over 50 files"):
        cfg.merge_from_file(path)
    assert len(opened) == 51


@pytest.mark.parametrize("key", ["NESTEROV", "BASE_LR", "STEPS"])
@pytest.mark.parametrize(
    "value",
    [
        *("!!bool maybe", "!!int ''", "!!int x", "!!float ''", "!!timestamp x", "!!null [1]"),
        *("!!binary '='", "!!set {a, b}", "!!omap [a]", "2020-01-01", "{? [a] : b}", "!<tag:x> 5"),
        *(
            "'" + "(" * 5000 + "'",
            "'" + "-" * 5000 + "1'",
            "'0x" + "f" * 9000 + "'",
            "1" + "0" * 400,
        ),
    ],
)
def test_values_that_confuse_a_parser_are_refused(
    cfg: CfgNode, write_yaml: WriteYaml, key: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        cfg.merge_from_file(write_yaml("a.yaml", f"SOLVER: {{{key}: {value}}}"))


@pytest.mark.parametrize("value", ["!!set {a}", "!!binary YQ==", "2020-01-01", "{a: 2020-01-01}"])
def test_a_key_whose_default_is_none_takes_plain_values_only(
    cfg: CfgNode, write_yaml: WriteYaml, value: str
) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.BIAS is .* of type (set|bytes|date|dict)"):
        cfg.merge_from_file(write_yaml("a.yaml", f"MODEL: {{BIAS: {value}}}"))


def test_f23_words_of_a_command_line_do_not_run(cfg: CfgNode, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    word = f"__import__('os').mkdir({str(canary)!r})"
    with pytest.raises(ConfigError, match=r"SOLVER.MAX_ITER is .*of type str"):
        cfg.merge_from_list(["SOLVER.MAX_ITER", word])
    assert not canary.exists()


# Nodes.


def test_frozen_config_refuses_every_change(cfg: CfgNode, write_yaml: WriteYaml) -> None:
    path = write_yaml("a.yaml", "SOLVER: {MAX_ITER: 7}")
    before = copy.deepcopy(dict(cfg))
    cfg.freeze()
    with pytest.raises(AttributeError, match="MAX_ITER to 5, but CfgNode is immutable"):
        cfg.SOLVER.MAX_ITER = 5
    with pytest.raises(AttributeError, match="MAX_ITER to 7, but CfgNode is immutable"):
        cfg.merge_from_file(path)
    with pytest.raises(AttributeError, match="MAX_ITER to 7, but CfgNode is immutable"):
        cfg.merge_from_list(["SOLVER.MAX_ITER", "7"])
    assert cfg == before
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = 5
    assert cfg.SOLVER.MAX_ITER == 5


def test_frozen_config_takes_no_new_keys_either() -> None:
    cfg = CfgNode({"A": 1}, new_allowed=True)
    cfg.freeze()
    with pytest.raises(AttributeError, match="B to 2, but CfgNode is immutable"):
        cfg.merge_from_list(["B", 2])
    assert "B" not in cfg


def test_clone_is_independent_and_as_frozen(cfg: CfgNode) -> None:
    cfg.freeze()
    cloned = cfg.clone()
    assert cloned == cfg
    assert cloned.is_frozen()
    assert cloned.SOLVER.is_frozen()
    cloned.defrost()
    cloned.MODEL.PIXEL_MEAN.append(2.0)
    cloned.MODEL.HEAD.WIDTH = 1
    assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.HEAD.WIDTH) == ([1.0], 8)
    assert cfg.is_frozen()


def test_config_survives_pickling(cfg: CfgNode) -> None:
    cfg.freeze()
    loaded = pickle.loads(pickle.dumps(cfg))
    assert loaded == cfg
    assert type(loaded.SOLVER) is CfgNode
    assert loaded.SOLVER.is_frozen()


def test_attribute_typo_names_the_nearest_key(cfg: CfgNode) -> None:
    with pytest.raises(AttributeError, match=r"no key 'MAX_ITERS'\. Did you mean 'MAX_ITER'\?"):
        _ = cfg.SOLVER.MAX_ITERS
    with pytest.raises(AttributeError, match=r"no key 'Q'\. It has: MAX_ITER, BASE_LR, NESTEROV"):
        _ = cfg.SOLVER.Q
    assert not hasattr(cfg, "SOLVERS")


def test_other_config_is_merged_by_the_same_rules_and_stays_independent(cfg: CfgNode) -> None:
    other = CfgNode({"SOLVER": {"BASE_LR": 2}, "MODEL": {"PIXEL_MEAN": [5.0]}})
    cfg.merge_from_other_cfg(other)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (2.0, 100)
    cfg.MODEL.PIXEL_MEAN.append(6.0)
    assert other.MODEL.PIXEL_MEAN == [5.0]
    with pytest.raises(ConfigError, match=r"^merged config: SOLVER.MAX_ITRE is not a config key"):
        cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"MAX_ITRE": 2}}))
    with pytest.raises(ConfigError, match=r"^merged config: SOLVER.MAX_ITER is 'x'"):
        cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"MAX_ITER": "x"}}))


def test_a_global_config_holds_what_was_set_last() -> None:
    for seed in (1, 2):
        set_global_cfg(CfgNode({"SEED": seed}))
        assert global_cfg == {"SEED": seed}
    set_global_cfg(CfgNode())
    assert global_cfg == {}
