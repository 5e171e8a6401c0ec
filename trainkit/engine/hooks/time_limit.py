"""`TimeLimit`: a run that leaves, to be resumed, before its time is up."""

import time

from trainkit.engine.hook_base import HookBase
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError


class TimeLimit(HookBase):
    """Interrupts a run before a wall-clock limit: it saves and leaves, and `--resume` goes on.

    It leaves as long before the limit as the longest pause between two steps was so far, which
    saves and evaluations make; with several ranks, also by the steps until they agree, by rank 0's
    clock.

    Args:
        seconds: Limit, counted from when the hook is made; above 0.

    Raises:
        ConfigError: If it is not above 0.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ConfigError(f"The time limit (SOLVER.MAX_SECONDS) is {seconds} s, not above 0 s.")
        self._seconds = seconds
        self._start = self._train_start = self._last = time.perf_counter()
        self._num_steps = 0
        self._longest = 0.0

    def before_train(self) -> None:
        """Starts to watch the pace; the limit runs already."""
        self._train_start = self._last = time.perf_counter()
        self._num_steps = 0

    def after_step(self) -> None:
        """Asks to leave if the next steps and a save may not fit."""
        if not comm.is_main_process():
            return
        now = time.perf_counter()
        self._longest, self._last = max(self._longest, now - self._last), now
        self._num_steps += 1
        # The next one, and those until ranks agree.
        steps = 1 + (self.trainer.gather_metric_period if comm.get_world_size() > 1 else 0)
        room = self._longest + steps * (now - self._train_start) / self._num_steps
        if now - self._start + room > self._seconds:
            self.trainer.request_stop(f"the time limit of {self._seconds:g} s")
