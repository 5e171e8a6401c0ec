import subprocess
import sys
import time

import pytest
import torch

import trainkit
from trainkit.utils.collect_env import collect_env_info


def facts(text: str) -> dict[str, str]:
    rows = [line.split(maxsplit=1) for line in text.splitlines() if not line.startswith("--")]
    return {row[0]: row[1].strip() for row in rows}


def test_table_names_the_versions_that_run() -> None:
    found = facts(collect_env_info())
    assert found["trainkit"] == trainkit.__version__
    assert found["Python"] == sys.version.split()[0]
    assert found["torch"].startswith(torch.__version__) or "threads" in found["torch"]
    assert found["numpy"].count(".") == 2


def test_table_names_each_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Accelerator {index}")
    text = collect_env_info()
    assert "GPU 0" in text
    assert "Accelerator 1" in text


def test_missing_library_is_said_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.utils.collect_env._LIBRARIES", ("no-such-library",))
    assert "not installed" in collect_env_info()


def test_collecting_takes_no_noticeable_time() -> None:
    collect_env_info()
    start = time.perf_counter()
    collect_env_info()
    assert time.perf_counter() - start < 0.05


@pytest.mark.slow
def test_module_prints_the_table() -> None:
    command = [sys.executable, "-m", "trainkit.utils.collect_env"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"torch            {torch.__version__}" in output
