"""What a bare installation can do: the core needs no extra and nothing that has gone."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import trainkit

ROOT = Path(trainkit.__file__).parents[1]
ABSENT = ["pkg_resources", "setuptools", "black", "hydra", "omegaconf", "cloudpickle", "wandb"]
ABSENT += ["tensorboard", "torch.utils.tensorboard", "mlflow", "matplotlib", "pygments"]
ABSENT += ["safetensors", "torchdata", "pycocotools", "cv2", "PIL"]

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # As if it were not installed.
import trainkit
names = [module.name for module in pkgutil.walk_packages(trainkit.__path__, "trainkit.")]
for name in names:
    importlib.import_module(name)
from trainkit.engine import default_writers
print(len(names), [type(writer).__name__ for writer in default_writers(".", 1)])
"""


@pytest.mark.slow
def test_d42_everything_imports_where_only_the_core_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL, *ABSENT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    number, _, writers = done.stdout.partition(" ")
    assert int(number) > 60
    assert writers == "['CommonMetricPrinter', 'JSONWriter']\n"


def test_d42_nothing_is_pinned_and_nothing_compiled() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert [name for name in required if "==" in name or "<" in name] == []
    suffixes = {path.suffix for path in ROOT.glob("trainkit/**/*") if path.is_file()}
    assert not suffixes & {".c", ".cpp", ".cu", ".pyx", ".so"}
