"""What a module owes its reader: names that resolve, docstrings, a test of its own, a size."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainkit

ROOT = Path(trainkit.__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(trainkit.__path__, "trainkit."))
FILES = sorted((ROOT / "trainkit").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_CLASS_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_TRAINER_BASE_LINES = 130

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """All classes and functions with their qualified names, however deep."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield f"{prefix}{child.name}", child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def lines_of(node: Definition) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def undocumented(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [] if ast.get_docstring(tree) else [f"{place(path, 1)} the module"]
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            missing += (
                [] if ast.get_docstring(node) else [f"{place(path, node.lineno)} {node.name}"]
            )
    return missing


def oversized(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    count = len(text.splitlines())
    found = [f"{place(path, 1)} has {count} lines"] if count > MAX_FILE_LINES else []
    for name, node in definitions(ast.parse(text)):
        limit = MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES
        if lines_of(node) > limit:
            found.append(f"{place(path, node.lineno)} {name} has {lines_of(node)} lines")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_resolves(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    assert [public for public in exported if not hasattr(module, public)] == []


def test_a_package_that_exports_anything_declares_it() -> None:
    silent = []
    for path in (ROOT / "trainkit").rglob("*/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assigned = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
        hidden = imported - {name for names in assigned for name in names}
        silent += [f"{path.relative_to(ROOT)} does not list {name}" for name in sorted(hidden)]
    assert silent == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_is_documented(path: Path) -> None:
    assert undocumented(path) == []


def test_every_module_has_a_test_of_its_name() -> None:
    mirrors = {
        path: ROOT / "tests" / path.relative_to(ROOT / "trainkit").with_name(f"test_{path.name}")
        for path in FILES
        if path.name != "__init__.py"
    }
    missing = [
        f"{path.relative_to(ROOT)} has no {mirror.relative_to(ROOT)}"
        for path, mirror in mirrors.items()
        if not mirror.exists()
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_files_classes_and_functions_keep_to_their_sizes() -> None:
    found = [text for path in FILES for text in oversized(path)]
    assert not found, "\n" + "\n".join(found)


def test_the_loop_fits_on_two_screens() -> None:
    tree = ast.parse((ROOT / "trainkit/engine/train_loop.py").read_text(encoding="utf-8"))
    (loop,) = (node for name, node in definitions(tree) if name == "TrainerBase")
    assert lines_of(loop) <= MAX_TRAINER_BASE_LINES


def test_ignores_are_rare_and_give_their_reason() -> None:
    lines = [
        (place(path, number), line)
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]
    ignores = [(where, line) for where, line in lines if re.search("#.*(type: ignore|noqa)", line)]
    reasoned = r"# (type: ignore\[[\w, -]+\]|noqa: [A-Z]+\d+)  # \w"
    assert [where for where, line in ignores if not re.search(reasoned, line)] == []
    assert len(ignores) <= len(lines) / 1000, [where for where, _ in ignores]


def test_a_planted_offence_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "x.py"
    body = "\n".join(["    x = 1"] * MAX_FUNCTION_LINES)
    path.write_text(f"class A:\n    '''Doc.'''\ndef f():\n{body}\ndef _g():\n    pass\n", "utf-8")
    assert undocumented(path) == ["x.py:1 the module", "x.py:3 f"]
    assert oversized(path) == [f"x.py:3 f has {MAX_FUNCTION_LINES + 1} lines"]
    path.write_text("\n" * (MAX_FILE_LINES + 1), "utf-8")
    assert oversized(path) == [f"x.py:1 has {MAX_FILE_LINES + 1} lines"]
