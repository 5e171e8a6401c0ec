import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainkit.config.lazy_files import run_config_file
from trainkit.utils.errors import ConfigError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, *lines: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def test_relative_imports_lead_to_files_beside_and_above_without_init(write: Write) -> None:
    write("common/train.py", "train = dict(max_iter=10)")
    write("common/optim.py", "from .train import train", "lr = train.max_iter / 100")
    # Neither the folder's name nor the file's is one that Python could import.
    path = write(
        "my configs v1.2/a-b.py",
        "from ..common.train import *",
        "from ..common.optim import lr",
        "from ..common import train as module",
        "from . import beside",
        "import math",
    )
    write("my configs v1.2/beside.py", "x = __file__")
    names = run_config_file(path)
    assert names["train"] == {"max_iter": 10}
    assert names["lr"] == 0.1
    assert names["module"].train.max_iter == 10
    assert names["beside"].x == str(Path(path).with_name("beside.py"))
    assert names["math"] is sys.modules["math"]


def test_an_imported_file_is_run_anew_each_time(write: Write) -> None:
    write("train.py", "train = dict(max_iter=10)")
    write("changes.py", "from .train import train", "train.max_iter = 20")
    path = write("main.py", "from .changes import train as changed", "from .train import train")
    assert run_config_file(path)["train"].max_iter == 10
    assert run_config_file(path)["changed"].max_iter == 20
    write("train.py", "train = dict(max_iter=30)")
    assert run_config_file(path)["train"].max_iter == 30


def test_functions_of_a_config_file_import_relatively_later_too(write: Write) -> None:
    write("train.py", "train = dict(max_iter=10)")
    path = write("main.py", "def late():", "    from .train import train", "    return train")
    assert run_config_file(path)["late"]() == {"max_iter": 10}


def test_d36_a_config_file_that_raises_leaves_imports_and_modules_as_they_were(
    write: Write,
) -> None:
    seen: list[Any] = []
    sys.modules["config_probe"] = type(sys)("config_probe")
    vars(sys.modules["config_probe"])["seen"] = seen
    before, modules = builtins.__import__, set(sys.modules)
    lines = "import builtins, config_probe", "config_probe.seen.append(builtins.__import__)"
    write("bad.py", *lines)
    path = write("main.py", "from .bad import missing")
    with pytest.raises(ConfigError, match=r"main\.py, line 1: ImportError: .*'missing'"):
        run_config_file(path)
    # Not even while the file ran was it another one.
    assert seen == [before]
    assert builtins.__import__ is before
    assert set(sys.modules) == modules
    del sys.modules["config_probe"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x = 1", "y = = 2"], r"main\.py, line 2: SyntaxError"),
        (["x = 1", "", "y = z"], r"main\.py, line 3: NameError: name 'z' is not defined"),
        (["from .trian import x"], r"'.*/trian\.py'.*Did you mean 'train\.py'\?"),
        (["from .train import optimizer"], r"main\.py, line 1: ImportError.*'optimizer'"),
        (["from . import trian"], r"'.*/trian\.py'.*Did you mean 'train\.py'\?"),
        ([f"from {'.' * 40}train import x"], "leads out of the file system. Use fewer dots"),
        (["from .main import x"], r"Config files import each other: .*main\.py -> .*main\.py"),
        (["x = '\0'"], r"main\.py, line None: .*null byte"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(
    write: Write, lines: list[str], message: str
) -> None:
    write("train.py", "train = dict(max_iter=10)")
    path = write("main.py", *lines)
    with pytest.raises(ConfigError, match=message):
        run_config_file(path)


def test_an_error_in_an_imported_file_names_its_importers(write: Write) -> None:
    write("train.py", "train = dict(max_iter=10)", "train['max_iter'] += []")
    path = write("main.py", "x = 1", "from .train import train")
    with pytest.raises(ConfigError, match=r"train\.py, line 2: TypeError") as raised:
        run_config_file(path)
    assert "main.py, line 2" in raised.value.__notes__[0]


def test_a_missing_omegaconf_is_named_with_the_mend(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(ConfigError, match=r"pip install 'trainkit\[lazy\]'"):
        run_config_file(write("main.py", "train = dict(max_iter=10)"))
