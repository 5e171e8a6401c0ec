import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainkit.engine.hooks.memory import TorchMemoryStats


@pytest.fixture(autouse=True)
def _capture_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def reports(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The iterations of the reports."""
    return [
        int(found[1])
        for message in caplog.messages
        if (found := re.match(r"Memory after iteration (\d+): ", message))
    ]


@pytest.mark.parametrize(
    ("period", "max_runs", "expected"),
    [(3, 2, [2, 5]), (3, 10, [2, 5, 8, 9]), (3, 4, [2, 5, 8, 9]), (0, 10, [9]), (1, 0, [])],
)
def test_d35_exactly_max_runs_reports_are_made(
    loop: Any, caplog: pytest.LogCaptureFixture, period: int, max_runs: int, expected: list[int]
) -> None:
    trainer = loop()
    trainer.register_hooks([TorchMemoryStats(period, max_runs)])
    trainer.train(0, 10)
    assert reports(caplog) == expected
    caplog.clear()
    trainer.train(0, 10)
    assert reports(caplog) == expected


def test_the_host_is_reported_without_an_accelerator(
    loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = loop()
    trainer.register_hooks([TorchMemoryStats()])
    trainer.train(0, 1)
    (mebibytes,) = re.findall(r"max_host_rss: (\d+)M", caplog.text)
    # A process with torch takes some hundred.
    assert 50 < int(mebibytes) < 100_000


@pytest.fixture
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of a device; nothing resets them."""
    counters = {
        "max_memory_reserved": 8 * 2**20,
        "memory_reserved": 4 * 2**20,
        "max_memory_allocated": 2 * 2**20,
        "memory_allocated": 2**20,
    }
    module = SimpleNamespace(**{name: lambda value=v: value for name, v in counters.items()})
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda: "| summary |")
    monkeypatch.delattr(torch.cuda, "reset_peak_memory_stats")


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize(("max_runs", "after"), [(2, 5), (10, 9)])
def test_d35_counters_of_the_device_are_read_and_not_reset(
    loop: Any, caplog: pytest.LogCaptureFixture, max_runs: int, after: int
) -> None:
    trainer = loop()
    trainer.register_hooks([TorchMemoryStats(3, max_runs)])
    trainer.train(0, 10)
    own = [record for record in caplog.records if record.name == "trainkit.engine.hooks.memory"]
    first, *_, last, summary = (record.getMessage() for record in own)
    assert first.startswith(
        "Memory after iteration 2: max_memory_reserved: 8M  memory_reserved: 4M  "
        "max_memory_allocated: 2M  memory_allocated: 1M  max_host_rss: "
    )
    assert f"iteration {after}:" in last
    assert summary == "\n| summary |"
    assert caplog.text.count("summary") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_d35_the_peak_of_a_gpu_stays_for_others(
    loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch.empty(2**26, device="cuda")
    peak = torch.cuda.max_memory_allocated()
    trainer = loop()
    trainer.register_hooks([TorchMemoryStats(1, 2)])
    trainer.train(0, 3)
    assert torch.cuda.max_memory_allocated() == peak >= 2**28
    assert f"max_memory_allocated: {peak / 2**20:.0f}M" in caplog.text
    assert caplog.text.count("PyTorch CUDA memory summary") == 1
