"""Every test starts from the same state of the process, whatever the one before it left behind."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from trainkit.utils.random import isolated_rng, seed_generators

# Two processes of a test on two cores must not fight for them with threads of their own.
torch.set_num_threads(1)
# A shell that runs the tests in its background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fresh_randomness() -> Iterator[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    with isolated_rng():
        seed_generators(0)
        yield
    # Only when it changed, because the first call of a process imports torch's compiler, 1 s.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def _fresh_loggers() -> Iterator[None]:
    """Undoes `setup_logger`, whose loggers do not propagate to where caplog listens."""
    yield
    for name in ("trainkit", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


_aten = torch.ops.aten


class FakeCuda:
    """Makes CPU tensors claim to be on cuda:0, and refuses to copy them to the CPU or read them.

    They carry no graph: torch without CUDA cannot run backward for them.

    Attributes:
        num_transfers: Copies and reads so far, those refused included.
    """

    def __init__(self) -> None:
        self.num_transfers = 0
        self._may_transfer = False

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor on "cuda:0" that shares the memory of `tensor`."""
        return _FakeCudaTensor(tensor, self)

    @contextlib.contextmanager
    def transfers_allowed(self) -> Iterator[None]:
        self._may_transfer = True
        try:
            yield
        finally:
            self._may_transfer = False

    def note_transfer(self, operation: str) -> None:
        self.num_transfers += 1
        if not self._may_transfer:
            raise RuntimeError(f"{operation} brings a tensor from cuda:0 to the CPU")


class _FakeCudaTensor(torch.Tensor):
    on_host: torch.Tensor
    owner: FakeCuda

    @staticmethod
    def __new__(
        cls: type["_FakeCudaTensor"], on_host: torch.Tensor, owner: FakeCuda
    ) -> "_FakeCudaTensor":
        fake: _FakeCudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=torch.device("cuda:0"),
        )
        fake.on_host = on_host.detach()
        fake.owner = owner
        return fake

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        owner = next(t.owner for t in tree_leaves((args, kwargs)) if isinstance(t, cls))
        inputs, options = tree_map_only(cls, lambda fake: fake.on_host, (args, kwargs))
        device = options.pop("device", None)
        is_copy_to_cpu = device is not None and device.type == "cpu"
        # `copy_` writes to its first argument.
        is_copy_to_cpu |= func is _aten.copy_.default and not isinstance(args[0], cls)
        if is_copy_to_cpu or func is _aten._local_scalar_dense.default:
            owner.note_transfer(str(func))
            return func(*inputs, **options)
        return tree_map_only(torch.Tensor, owner, func(*inputs, **options))


@pytest.fixture
def fake_cuda() -> FakeCuda:
    """Wraps tensors so that they claim to be on cuda:0 and raise when they are brought over."""
    return FakeCuda()
