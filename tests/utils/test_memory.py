import gc
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import FakeCuda
from trainkit.utils.memory import retry_if_cuda_oom


class Hungry:
    """Raises the given errors one by one, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.devices: list[str] = []

    def __call__(self, batch: dict[str, torch.Tensor], name: str = "") -> torch.Tensor:
        self.devices.append(batch["x"].device.type)
        if self.errors:
            raise self.errors.pop(0)
        return batch["x"] + 1


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes torch see an accelerator; how often its cache was emptied."""
    calls: list[str] = []
    module = SimpleNamespace(empty_cache=lambda: calls.append("emptied"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: module)
    return calls


OUT_OF_MEMORY = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
]


def test_what_fits_runs_once(emptied: list[str]) -> None:
    hungry = Hungry()
    assert torch.equal(retry_if_cuda_oom(hungry)({"x": torch.zeros(2)}), torch.ones(2))
    assert len(hungry.devices) == 1
    assert emptied == []


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_it_tries_again_with_an_empty_cache(
    error: Callable[[], Exception], emptied: list[str], fake_cuda: FakeCuda
) -> None:
    hungry = Hungry(error())
    batch = {"x": fake_cuda(torch.zeros(2))}
    assert retry_if_cuda_oom(hungry)(batch).device.type == "cuda"
    assert emptied == ["emptied"]
    assert hungry.devices == ["cuda", "cuda"]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_at_last_it_goes_to_the_cpu_with_nested_tensors_and_says_so(
    error: Callable[[], Exception],
    emptied: list[str],
    fake_cuda: FakeCuda,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hungry = Hungry(error(), error())
    batch = {"x": fake_cuda(torch.zeros(2))}
    with fake_cuda.transfers_allowed(), caplog.at_level(logging.WARNING):
        result = retry_if_cuda_oom(hungry)(batch, name="n")
    assert torch.equal(result, torch.ones(2))
    assert hungry.devices == ["cuda", "cuda", "cpu"]
    assert "ran out of the accelerator's memory twice and goes to the CPU" in caplog.text
    # The caller's own batch is where it was.
    assert batch["x"].device.type == "cuda"


def test_a_third_failure_and_other_errors_are_raised(emptied: list[str]) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="third"):
        retry_if_cuda_oom(Hungry(*map(torch.OutOfMemoryError, ("1", "2", "third"))))(
            {"x": torch.zeros(1)}
        )
    hungry = Hungry(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        retry_if_cuda_oom(hungry)({"x": torch.zeros(1)})
    assert len(hungry.devices) == 1


def test_without_an_accelerator_it_retries_too() -> None:
    hungry = Hungry(torch.OutOfMemoryError("x"))
    assert torch.equal(retry_if_cuda_oom(hungry)({"x": torch.zeros(1)}), torch.ones(1))


def test_what_the_failed_call_held_is_free_before_the_retry(emptied: list[str]) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    @retry_if_cuda_oom
    def allocate() -> bool:
        """Says whether the call before left nothing behind."""
        if held:
            return held[0]() is None
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("x")

    gc.disable()
    try:
        assert allocate()
    finally:
        gc.enable()
    assert allocate.__name__ == "allocate"
    assert "left nothing" in str(allocate.__doc__)


def test_methods_can_be_decorated() -> None:
    class Model:
        @retry_if_cuda_oom
        def double(self, x: Any) -> Any:
            return 2 * x

    assert Model().double(3) == 6
