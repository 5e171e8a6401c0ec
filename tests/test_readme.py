"""Runs the Python code of the README."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def code_blocks(text: str, language: str = "python") -> list[str]:
    """The code of each block, moved down to its own line so that tracebacks show the right one."""
    blocks = re.finditer(rf"^```{language}[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


def test_python_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"
    # Later blocks go on from earlier ones, as a reader does.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_blocks_keep_their_line_numbers_and_other_languages_are_left_out() -> None:
    text = "# x\n```bash\nls\n```\n```python\na = 1\n```\ntext\n```python\n1 / 0\n```\n"
    first, second = code_blocks(text)
    assert first.strip() == "a = 1"
    with pytest.raises(ZeroDivisionError) as raised:
        exec(compile(second, "README.md", "exec"), {})
    assert raised.traceback[-1].lineno + 1 == 10
