"""`TorchMemoryStats`: how much memory the first steps take, on the device and on the host."""

import logging
import resource
import sys

import torch

from trainkit.engine.hook_base import HookBase
from trainkit.utils.period import is_due

logger = logging.getLogger(__name__)

# CUDA and XPU have the first four, MPS has the last two.
_COUNTERS = (
    *("max_memory_reserved", "memory_reserved", "max_memory_allocated", "memory_allocated"),
    *("driver_allocated_memory", "current_allocated_memory"),
)
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class TorchMemoryStats(HookBase):
    """Logs the memory that torch holds on the accelerator, and the peak of this process.

    Peaks are those since the process began: they are read, never reset. With the last report on
    CUDA comes `torch.cuda.memory_summary()`.

    Args:
        period: Iterations between two reports; one more follows the last iteration.
        max_runs: Number of reports.
    """

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        self._period = period
        self._max_runs = max_runs
        self._num_runs = 0

    def before_train(self) -> None:
        """Begins to count."""
        self._num_runs = 0

    def after_step(self) -> None:
        """Reports if it is due, until `max_runs` reports are made."""
        trainer = self.trainer
        is_last = trainer.iter == trainer.max_iter - 1
        if self._num_runs >= self._max_runs or not (is_due(trainer.iter, self._period) or is_last):
            return
        self._num_runs += 1
        module = torch.get_device_module()
        counters = {name: getattr(module, name)() for name in _COUNTERS if hasattr(module, name)}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        parts = [f"{n}: {b / 2**20:.0f}M" for n, b in {**counters, "max_host_rss": host}.items()]
        logger.info("Memory after iteration %d: %s", trainer.iter, "  ".join(parts))
        if torch.cuda.is_available() and (is_last or self._num_runs == self._max_runs):
            logger.info("\n%s", torch.cuda.memory_summary())
