import pytest
import torch

from trainkit.utils import comm
from trainkit.utils.device import autocast, resolve_device
from trainkit.utils.errors import ConfigError


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


def test_auto_prefers_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda", 0)


def test_auto_takes_mps_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"


def test_cuda_without_a_number_is_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 4)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 3)
    assert resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:2", 2)])
def test_a_missing_device_is_named_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    pretend_cuda(monkeypatch, count)
    text = rf"MODEL.DEVICE is '{name}' but .* sees {count} cuda device.*Set MODEL.DEVICE to auto"
    with pytest.raises(ConfigError, match=text):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
def test_a_word_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"MODEL.DEVICE is '{name}', which is not a device. Use"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_runs_matrix_products_in_its_precision(precision: str, dtype: torch.dtype) -> None:
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER.PRECISION\) is 'fp8'; .*fp32, bf16"):
        autocast("fp8", torch.device("cpu"))
