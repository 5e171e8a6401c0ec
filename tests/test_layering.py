"""Reads the imports of trainkit/ and tools/ and holds them against the staircase of the design."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import trainkit

ROOT = Path(trainkit.__file__).parents[1]

STEPS = {
    "tools": 5,
    "trainkit.testing": 4,
    "trainkit.engine": 3,
    "trainkit.model_zoo": 3,
    "trainkit.data": 2,
    "trainkit.modeling": 2,
    "trainkit.solver": 2,
    "trainkit.checkpoint": 2,
    "trainkit.evaluation": 2,
    "trainkit.config": 1,
    "trainkit.utils": 0,
    "trainkit": -1,
}
# Extras, or slow to import: these are imported by the function that needs them, and only these are.
OPTIONAL = (
    "fvcore.nn",
    "hydra",
    "matplotlib",
    "omegaconf",
    "pygments",
    "safetensors",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True)
class Import:
    """One imported module, with its place."""

    place: str
    source: str
    target: str
    in_init: bool
    in_function: bool
    for_types: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_modules(root: Path) -> dict[str, Path]:
    files = [path for top in ("trainkit", "tools") for path in (root / top).rglob("*.py")]
    return {module_name(path, root): path for path in sorted(files)}


def import_nodes(
    node: ast.AST, in_function: bool = False, for_types: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, in_function, for_types
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from import_nodes(child, in_function or inside, for_types or typing_only)


def targets(node: ast.Import | ast.ImportFrom, path: Path, source: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    return [f"{base}.{alias.name}" for alias in node.names]


def find_imports(root: Path) -> list[Import]:
    modules = find_modules(root)
    found = []
    for source, path in modules.items():
        text = path.read_text(encoding="utf-8")
        for node, in_function, for_types in import_nodes(ast.parse(text)):
            line = text.splitlines()[node.lineno - 1].strip()
            place = f"{path.relative_to(root)}:{node.lineno}: {line}"
            for target in targets(node, path, source):
                # In `from a.b import c`, c is a module or a name in the module a.b.
                if isinstance(node, ast.ImportFrom) and target not in modules:
                    owner = target.rpartition(".")[0]
                    target = target if is_optional(target) else owner
                init = path.name == "__init__.py"
                found.append(Import(place, source, target, init, in_function, for_types))
    return found


def is_optional(module: str) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in OPTIONAL)


def package_of(module: str) -> str:
    top = module.split(".")
    return top[0] if top[0] == "tools" else ".".join(top[:2])


def complaint(found: Import, packages: set[str]) -> str | None:
    """What is wrong with one import, or None."""
    if is_optional(found.target):
        eager = not found.in_function and not found.for_types
        return f"{found.target} is optional or slow: import it where it is used" if eager else None
    if found.in_function:
        return "an import inside a function is for optional or slow packages only"
    if found.target.split(".")[0] not in ("trainkit", "tools"):
        return None
    source, target = package_of(found.source), package_of(found.target)
    if target == "tools":
        return "nobody imports tools"
    if source not in STEPS or target not in STEPS:
        return f"{source if source not in STEPS else target} has no step in the staircase"
    if source != target and STEPS[target] >= STEPS[source]:
        return f"{source} (step {STEPS[source]}) imports {target} (step {STEPS[target]})"
    if source != "tools" and not found.in_init and found.target in packages:
        return "import from the defining module, not from the package"
    return None


def find_offences(root: Path) -> list[str]:
    paths = find_modules(root)
    # `trainkit` itself defines __version__, all other packages only re-export.
    packages = {name for name, path in paths.items() if path.name == "__init__.py"} - {"trainkit"}
    complaints = [(found, complaint(found, packages)) for found in find_imports(root)]
    return [f"{found.place}  <- {text}" for found, text in complaints if text]


def find_cycle(root: Path) -> list[str]:
    """The imports that make up one cycle; none if there is no cycle."""
    imports = find_imports(root)
    modules = find_modules(root)
    graph: dict[str, set[str]] = {}
    for found in imports:
        if found.target in modules and found.target != found.source:
            graph.setdefault(found.source, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # Each module in the error's list is imported by the one after it.
        edges = [(b, a) for a, b in zip(error.args[1], error.args[1][1:], strict=False)]
        return [next(i.place for i in imports if (i.source, i.target) == edge) for edge in edges]
    return []


def test_imports_only_go_down_the_staircase() -> None:
    offences = find_offences(ROOT)
    assert not offences, "\n" + "\n".join(offences)


def test_no_modules_import_each_other_in_a_cycle() -> None:
    cycle = find_cycle(ROOT)
    assert not cycle, "\n" + "\n".join(cycle)


def test_the_walk_reads_the_whole_library() -> None:
    modules = find_modules(ROOT)
    assert {"trainkit", "trainkit.utils", "trainkit.utils.comm"} <= set(modules)
    assert len(find_imports(ROOT)) > len(modules)


def plant(root: Path, path: str, text: str) -> None:
    for name in ("trainkit", "trainkit/utils", "trainkit/solver", "trainkit/data"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "__init__.py").touch()
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "line", "reason"),
    [
        ("trainkit/utils/x.py", "from trainkit.config.config import CfgNode", "(step 0) imports"),
        ("trainkit/utils/x.py", "from ..config.config import CfgNode", "(step 0) imports"),
        ("trainkit/solver/x.py", "from trainkit.data.build import build", "(step 2) imports"),
        ("trainkit/solver/x.py", "import trainkit.engine.train_loop", "(step 2) imports"),
        ("trainkit/solver/x.py", "from trainkit import data", "(step 2) imports"),
        ("trainkit/solver/__init__.py", "from trainkit.data.x import y", "(step 2) imports"),
        ("trainkit/__init__.py", "from trainkit.utils import comm", "(step -1) imports"),
        ("trainkit/new/x.py", "from trainkit.utils.comm import x", "trainkit.new has no step"),
        ("trainkit/solver/x.py", "from trainkit.utils import get_rank", "the defining module"),
        ("trainkit/solver/x.py", "import trainkit.utils", "the defining module"),
        ("trainkit/solver/x.py", "from trainkit.solver import SGD", "the defining module"),
        ("trainkit/engine/x.py", "from tools.train_net import main", "nobody imports tools"),
        ("tools/x.py", "from tools.train_net import main", "nobody imports tools"),
        ("tools/x.py", "import matplotlib.pyplot as plt", "is optional or slow"),
        ("trainkit/utils/x.py", "from fvcore.nn import parameter_count", "is optional or slow"),
        ("trainkit/utils/x.py", "from fvcore import nn", "is optional or slow"),
    ],
)
def test_a_planted_offence_is_named_with_its_line(
    tmp_path: Path, path: str, line: str, reason: str
) -> None:
    plant(tmp_path, path, f'"""Planted."""\n\n{line}\n')
    (offence,) = find_offences(tmp_path)
    assert offence.startswith(f"{path}:3: {line}  <- ")
    assert reason in offence


@pytest.mark.parametrize("line", ["import json", "from trainkit.data.build import build"])
def test_a_planted_import_inside_a_function_is_named(tmp_path: Path, line: str) -> None:
    plant(tmp_path, "trainkit/solver/x.py", f"class A:\n    def f(self):\n        {line}\n")
    (offence,) = find_offences(tmp_path)
    assert offence.startswith(f"trainkit/solver/x.py:3: {line}  <- an import inside a function")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("trainkit/utils/x.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter"),
        ("trainkit/utils/x.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
        ("trainkit/utils/x.py", "import matplotlib_inline\nfrom fvcore.common.config import X"),
        ("trainkit/utils/x.py", "import trainkit\nfrom trainkit import __version__"),
        ("trainkit/solver/x.py", "from trainkit.utils import comm\nfrom . import build"),
        ("trainkit/solver/__init__.py", "from trainkit.solver.build import build_optimizer"),
        ("tools/x.py", "from trainkit.engine import DefaultTrainer"),
    ],
)
def test_what_is_allowed_is_not_complained_about(tmp_path: Path, path: str, text: str) -> None:
    plant(tmp_path, path, text)
    (tmp_path / "trainkit/utils/comm.py").touch()
    (tmp_path / "trainkit/solver/build.py").touch()
    assert find_offences(tmp_path) == []
    assert find_cycle(tmp_path) == []


def test_a_planted_cycle_is_named_with_all_its_lines(tmp_path: Path) -> None:
    plant(tmp_path, "trainkit/utils/a.py", "import os\nfrom trainkit.utils import b\n")
    plant(tmp_path, "trainkit/utils/b.py", "def f():\n    from trainkit.utils.c import d\n")
    plant(tmp_path, "trainkit/utils/c.py", "if TYPE_CHECKING:\n    import trainkit.utils.a\n")
    assert sorted(find_cycle(tmp_path)) == [
        "trainkit/utils/a.py:2: from trainkit.utils import b",
        "trainkit/utils/b.py:2: from trainkit.utils.c import d",
        "trainkit/utils/c.py:2: import trainkit.utils.a",
    ]


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_trainkit_imports_nothing_heavy() -> None:
    loaded = run_python("import sys, trainkit; print(*sys.modules)").split()
    assert "trainkit" in loaded
    heavy = {"torch", "numpy", "fvcore", "iopath", "yaml", "tabulate", "trainkit.utils"}
    assert not heavy & set(loaded)


@pytest.mark.slow
def test_importing_the_engine_adds_little_to_importing_torch() -> None:
    code = (
        "import time, torch; start = time.process_time(); import trainkit.engine; "
        "print(time.process_time() - start)"
    )
    # Of the processor, the best of three: what a busy machine adds is no fault of the library's.
    assert min(float(run_python(code)) for _ in range(3)) <= 0.3
