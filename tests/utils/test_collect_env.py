import re
import subprocess
import sys
import time

import pytest
import torch

import trainkit
from trainkit.utils import collect_env
from trainkit.utils.collect_env import check_devices, collect_env_info, main


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


def test_table_names_what_ranks_can_talk_by() -> None:
    expected = [name for name in ("gloo", "nccl") if torch.distributed.is_backend_available(name)]
    assert facts(collect_env_info())["distributed"].split(", ")[: len(expected)] == expected
    assert "gloo" in expected


def test_every_device_multiplies() -> None:
    checks = dict(check_devices())
    assert checks["cpu"] == "works"
    assert len(checks) == 1 + torch.accelerator.device_count()


def test_a_device_that_fails_or_is_wrong_is_named_and_gives_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    # CPU tensors on "meta" cannot be read, as those of a broken device.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("meta:0  fails: ") for line in lines)
    monkeypatch.setattr(torch, "ones", torch.zeros)
    assert collect_env._check("cpu") == "computes wrong: 0.0 instead of 262144"


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    usage = " ".join(capsys.readouterr().out.split())
    assert usage.startswith("usage: python -m trainkit.utils.collect_env")
    assert "multiplies small matrices on every device" in usage


@pytest.mark.slow
def test_module_prints_the_table_and_what_each_device_did() -> None:
    command = [sys.executable, "-m", "trainkit.utils.collect_env"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"torch            {torch.__version__}" in output
    assert torch.__config__.show() in output
    assert re.search(r"^cpu +works$", output, re.MULTILINE)
