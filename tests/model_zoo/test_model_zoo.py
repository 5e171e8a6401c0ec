"""The configs that come with trainkit are found by name, in a checkout and in a wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from torch import nn

import trainkit
from trainkit import model_zoo
from trainkit.model_zoo import model_zoo as module
from trainkit.modeling import ImageClassifier
from trainkit.utils.errors import ConfigError, UnknownNameError

ROOT = Path(trainkit.__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT / "configs").as_posix()
    for path in (ROOT / "configs").rglob("*")
    if path.suffix in (".yaml", ".py")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_found(name: str) -> None:
    assert Path(model_zoo.get_config_file(name)) == ROOT / "configs" / name


@pytest.mark.parametrize("function", [model_zoo.get_config_file, model_zoo.get_config])
def test_an_unknown_name_gets_the_nearest(function: object) -> None:
    assert callable(function)
    text = r"Unknown config 'fashion_mist\.yaml'\. Did you mean 'fashion_mnist\.yaml'\? Known: Base"
    with pytest.raises(UnknownNameError, match=text):
        function("fashion_mist.yaml")


def test_a_config_is_read_with_its_base() -> None:
    cfg = model_zoo.get_config("fashion_mnist.yaml")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.NESTEROV) == (2000, True)
    assert model_zoo.get_config("fashion_mnist.yaml") is not cfg


def test_a_model_comes_on_its_device_in_training_mode() -> None:
    model = model_zoo.get("fashion_mnist.yaml", device="cpu")
    assert isinstance(model, ImageClassifier)
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    with pytest.raises(ConfigError, match="'gpu', which is not a device"):
        model_zoo.get("fashion_mnist.yaml", device="gpu")


def test_a_python_config_is_loaded_and_its_model_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("omegaconf")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "net.py").write_text(
        "import torch\nfrom trainkit.config.lazy import LazyCall as L\n"
        "model = L(torch.nn.Linear)(in_features=2, out_features=3)\n"
        "train = dict(device='cpu')\n"
    )
    monkeypatch.setattr(module, "_HERE", tmp_path / "model_zoo.py")
    assert model_zoo.get_config("net.py").model.in_features == 2
    model = model_zoo.get("net.py")
    assert isinstance(model, nn.Linear)
    assert next(model_zoo.get("net.py", device="meta").parameters()).device.type == "meta"


def test_trained_weights_are_not_promised() -> None:
    with pytest.raises(ConfigError, match="No trained weights are published for fashion_mnist"):
        model_zoo.get("fashion_mnist.yaml", trained=True)


@pytest.mark.slow
def test_a_wheel_brings_the_configs_and_finds_them(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    copy = tmp_path / "source"
    for name in ("trainkit", "configs"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, copy], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(installed)
    assert top == {"trainkit", f"trainkit-{trainkit.__version__}.dist-info"}
    code = (
        "from trainkit import model_zoo; "
        f"print(*(model_zoo.get_config_file(name) for name in {CONFIGS}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    folder = installed / "trainkit" / "model_zoo" / "configs"
    assert found == [str(folder / name) for name in CONFIGS]
