"""What the pages in docs/ say exists, and the script of the migration page runs."""

import difflib
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.common.benchmark import timeit
from fvcore.common.timer import Timer
from torch import nn
from torch.fx import symbolic_trace
from torch.fx._symbolic_trace import is_fx_tracing

from tests.test_readme import README, code_blocks
from trainkit.config.config import CfgNode
from trainkit.config.defaults import get_cfg
from trainkit.solver.build import reduce_param_groups

ROOT = README.parent
DOCS = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
MOVING = ("detectron2.md", "migrating-from-detectron2.md")
NUM_FAULTS = 51

_LINKED_TESTS = re.compile(r"\]\(\.\./(tests/[\w/]+\.py)\):\s((?:`test_\w+`(?:, )?)+)")
_NAME = re.compile(r"(?<![\w/.])(?:trainkit|torch|fvcore|iopath)(?:\.\w+)+")
# Words in capitals that are no keys: of Slurm's, and of arithmetic.
_NO_KEYS = {"SIGINT", "SIGTERM", "SIGUSR1", "SIGKILL", "RLIMIT_FSIZE"}


def rows_of(text: str) -> list[list[str]]:
    """The cells of all rows of tables, but for heads and rules."""
    lines = text.splitlines()
    rules = {i for i, line in enumerate(lines) if re.fullmatch(r"\|[-|]+\|", line)}
    tables = [i for i, line in enumerate(lines) if line.startswith("|") and i not in rules]
    rows = [lines[i] for i in tables if i + 1 not in rules]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def prose_of(text: str) -> str:
    """A page without its blocks of code, and without what a table says of detectron2."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)


def resolve(name: str) -> Any:
    """Imports the longest part of a dotted name that is a module, and looks the rest up in it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def wrong_names(text: str) -> list[str]:
    wrong = []
    with warnings.catch_warnings():
        # fvcore.nn compiles as it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in _NAME.findall(text):
            try:
                resolve(name)
            except (ModuleNotFoundError, AttributeError):
                wrong.append(name)
    return wrong


def wrong_tests(text: str) -> list[str]:
    wrong, linked = [], 0
    for file, names in _LINKED_TESTS.findall(text):
        source = (ROOT / file).read_text("utf-8") if (ROOT / file).exists() else ""
        for name in re.findall(r"`(\w+)`", names):
            linked += 1
            if not re.search(rf"^\s*def {name}\(", source, re.MULTILINE):
                wrong.append(f"{file}: {name}")
    without_file = len(re.findall(r"`test_\w+`", text)) - linked
    return [*wrong, *(["a test without its file"] if without_file else [])]


def wrong_keys(text: str) -> list[str]:
    keys = [key for code in re.findall(r"`([^`]+)`", prose_of(text)) for key in keys_in(code)]
    return [key for key in keys if not is_key(key)]


def keys_in(code: str) -> list[str]:
    """The config keys in a piece of code; `A.{B, C}` is two."""
    for prefix, inner in re.findall(r"([A-Z][A-Z0-9_.]*)\{([A-Z0-9_, ]+)\}", code):
        code += "".join(f" {prefix}{name}" for name in inner.split(", "))
    code = re.sub(r"\{[^}]*\}", "", code)
    return re.findall(r"(?<![\w.$…])[A-Z][A-Z0-9_]{2,}(?:\.[A-Z0-9_]+)*(?![\w.(])", code)


def is_key(key: str) -> bool:
    node: Any = get_cfg()
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return key in _NO_KEYS
        node = node[part]
    return True


def wrong_imports(text: str) -> list[str]:
    """The names that the modules of a block such as "trainkit.engine: launch" do not have."""
    block = re.sub(r"\n +", " ", "".join(code_blocks(text, "text")))
    wrong = []
    for module, names in re.findall(r"^(trainkit[\w.]+): (.*)$", block, re.MULTILINE):
        wrong += wrong_names(" ".join(f"{module}.{name}" for name in names.split()))
    return wrong


def wrong_links(text: str) -> list[str]:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [k for k in links if k and "://" not in k and not (ROOT / "docs" / k).exists()]


def rows_without_a_test(text: str) -> list[str]:
    """The rows that name something of trainkit's, or give a line for it, but no test."""
    rows = [row for row in rows_of(text) if len(row) >= 3]
    left_out = re.compile("left out|deliberately absent")
    return [row[0] for row in rows if "`test_" not in row[-1] and not left_out.search(row[1])]


@pytest.mark.parametrize("page", sorted(DOCS))
def test_every_name_in_the_docs_exists(page: str) -> None:
    assert wrong_names(DOCS[page]) == []


@pytest.mark.parametrize("page", sorted(DOCS))
def test_every_test_that_the_docs_name_exists(page: str) -> None:
    assert wrong_tests(DOCS[page]) == []
    assert _LINKED_TESTS.search(DOCS[page])


@pytest.mark.parametrize("page", sorted(DOCS))
def test_every_config_key_in_the_docs_exists(page: str) -> None:
    assert wrong_keys(DOCS[page]) == []


@pytest.mark.parametrize("page", sorted(DOCS))
def test_every_link_in_the_docs_leads_to_a_file(page: str) -> None:
    assert wrong_links(DOCS[page]) == []


def test_names_are_in_the_modules_that_the_table_says() -> None:
    text = DOCS["detectron2.md"]
    assert wrong_imports(text) == []
    assert "trainkit.engine.hooks: CallbackHook" in text


def test_each_row_of_the_table_has_a_test_or_says_why_it_is_left_out() -> None:
    assert len(rows_of(DOCS["detectron2.md"])) > 150
    assert rows_without_a_test(DOCS["detectron2.md"]) == []


def test_each_fault_has_its_row_with_a_test_of_its_number() -> None:
    rows = [row for row in rows_of(DOCS["detectron2.md"]) if re.fullmatch(r"D\d+", row[0])]
    assert [row[0] for row in rows] == [f"D{number}" for number in range(1, NUM_FAULTS + 1)]
    for number, row in enumerate(rows, start=1):
        assert re.search(rf"`test_\w*?d{number:02}_\w+`|cannot occur", row[-1]), row


def test_each_fault_of_the_reliability_table_has_its_row_with_a_test() -> None:
    rows = [row for row in rows_of(DOCS["reliability.md"]) if re.fullmatch(r"F\d+", row[0])]
    assert len(rows) == 21
    for row in rows:
        assert re.search(rf"`test_\w*?f{int(row[0][1:]):02}_\w+`", row[-1]), row


@pytest.mark.parametrize(
    ("find", "text"),
    [
        (wrong_names, "see `trainkit.engine.DefaultTrainr`"),
        (wrong_names, "see `fvcore.nn.no_such_loss`"),
        (wrong_names, "```python\nimport trainkit.engin\n```"),
        (wrong_tests, "| a | b | [`test_docs.py`](../tests/test_docs.py): `test_no_such` |"),
        (wrong_tests, "| a | b | [`x.py`](../tests/x.py): `test_every_name_in_the_docs_exists` |"),
        (wrong_tests, "`test_every_name_in_the_docs_exists` without its file"),
        (wrong_keys, "set `SOLVER.MAX_ITR` to 3"),
        (wrong_keys, "| a | `SOLVER.{MAX_ITER, BASE_RL}` |"),
        (wrong_keys, "set `SEEED 3`"),
        (wrong_links, "[a](detectron3.md)"),
        (wrong_imports, "```text\ntrainkit.data: MapDataset\n    MapDatset\n```"),
        (rows_without_a_test, "| a | b | c |\n|---|---|---|\n| `A` | `trainkit.A` | |"),
    ],
)
def test_a_wrong_entry_is_found(find: Callable[[str], list[str]], text: str) -> None:
    assert len(find(text)) == 1


def test_right_entries_are_not_complained_about() -> None:
    assert keys_in("SOLVER.{MAX_ITER, STEPS} 3") == ["SOLVER.MAX_ITER", "SOLVER.STEPS"]
    assert not wrong_keys("| `NO.KEY` | `SOLVER.MAX_ITER`, `DDP`, `$ENV`, `VERSION` |")
    assert not wrong_names("`trainkit.config.instantiate.dump_dataclass`, `tools/trainkit.py`")


def test_the_lines_that_stand_for_small_helpers_do_what_these_did() -> None:
    class Tells(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x if is_fx_tracing() else None

    assert symbolic_trace(Tells())(torch.ones(1)) is not None
    assert Tells()(torch.ones(1)) is None

    timer = Timer()
    timer.pause()
    assert timer.seconds() >= 0
    assert timeit(num_iters=3)(lambda: None)()["iterations"] == 3

    cfg = get_cfg()
    cfg.freeze()
    cfg.COMPUTED_SIZE = 3
    assert cfg.COMPUTED_SIZE == 3
    with pytest.raises(KeyError, match="COMPUTED_SIZE"):
        cfg.COMPUTED_SIZE = 4

    groups = [{"params": [1, 2], "lr": 0.1}]
    expanded = [{**g, "params": [p]} for g in groups for p in g["params"]]  # type: ignore[attr-defined]  # A list.
    assert [group["params"] for group in expanded] == [[1], [2]]
    assert reduce_param_groups(expanded) == groups


def test_the_lines_of_torch_compute_what_fvcores_functions_did() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        fvcore_nn = importlib.import_module("fvcore.nn")
    torch.manual_seed(0)
    x, y = torch.randn(20), torch.randn(20)
    ours = nn.functional.smooth_l1_loss(x, y, beta=0.3, reduction="sum")
    assert torch.equal(ours, fvcore_nn.smooth_l1_loss(x, y, 0.3, "sum"))
    conv = nn.Conv2d(3, 4, 3)
    fills: list[tuple[Callable[[nn.Module], Any], Callable[[torch.Tensor], Any]]] = [
        (fvcore_nn.c2_xavier_fill, lambda w: nn.init.kaiming_uniform_(w, a=1)),
        (
            fvcore_nn.c2_msra_fill,
            lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
        ),
    ]
    for theirs, torchs in fills:
        torch.manual_seed(0)
        theirs(conv)
        filled = conv.weight.detach().clone()
        torch.manual_seed(0)
        torchs(conv.weight)
        assert torch.equal(conv.weight, filled)


def renamed_script(folder: Path) -> tuple[str, str]:
    """Writes the script of the migration page and renames it by the line that stands there."""
    page = DOCS["migrating-from-detectron2.md"]
    path = folder / "rows.py"
    path.write_text(code_blocks(page, "python")[0].lstrip("\n"), "utf-8")
    before = path.read_text("utf-8")
    rename = next(block for block in code_blocks(page, "bash") if "sed -i" in block)
    subprocess.run(["bash", "-euo", "pipefail", "-c", rename], cwd=folder, check=True)
    return before, path.read_text("utf-8")


def test_the_rename_changes_the_lines_that_the_page_shows(tmp_path: Path) -> None:
    before, after = renamed_script(tmp_path)
    changed = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
    lines = [line for line in changed if not line.startswith(("---", "+++", "@@"))]
    shown = code_blocks(DOCS["migrating-from-detectron2.md"], "diff")[0].split("\n")
    assert sorted(lines) == sorted(line for line in shown if line)
    assert "detectron2" not in after


@pytest.mark.slow
def test_the_script_of_the_migration_page_runs_after_the_rename(tmp_path: Path) -> None:
    renamed_script(tmp_path)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error::FutureWarning", "rows.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def result(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        output = tmp_path / folder
        lines = (output / "metrics.json").read_text("utf-8").splitlines()
        rows = {row["iteration"]: row for row in map(json.loads, lines)}
        weights = torch.load(output / "model_final.pth", weights_only=True)["model"]
        return weights, {"accuracy": rows[80]["rows/accuracy"], **rows[79]}

    run("SOLVER.MAX_ITER", "40")
    assert "Starting training from iteration 40" in run("--resume")
    run("OUTPUT_DIR", "unbroken")
    weights, metrics = result("output")
    expected_weights, expected = result("unbroken")
    assert all(torch.equal(weights[name], w) for name, w in expected_weights.items())
    for name in ("accuracy", "largest_gradient", "loss_cls", "lr"):
        assert metrics[name] == expected[name]
    assert metrics["accuracy"] > 90
    assert metrics["largest_gradient"] > 0
    assert (tmp_path / "output" / "model_best.pth").exists()

    judged = ["TEST.EXPECTED_RESULTS", str([["rows", "accuracy", metrics["accuracy"], 0.01]])]
    assert "are as TEST.EXPECTED_RESULTS says" in run("--eval-only", "--resume", *judged)
    run("--num-gpus", "2", "OUTPUT_DIR", "two", "SOLVER.MAX_ITER", "10")
    assert (tmp_path / "two" / "model_final.pth").exists()
