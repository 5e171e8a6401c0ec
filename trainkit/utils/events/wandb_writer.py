"""`WandbWriter`: metrics and images as a run of Weights & Biases."""

from typing import Any

import numpy as np

from trainkit.utils.events.writer import RunWriter


class WandbWriter(RunWriter):
    """Writes a run of Weights & Biases; the iteration is its step.

    A resumed run goes on under the same id. W&B's steps only rise: what comes for a step before the
    last one that it knows is left out. Offline (`mode="offline"`), every process leaves a folder of
    its own, and W&B joins them by the id when they are synced.

    Args:
        window_size: Iterations that the median of a smoothed scalar covers.
        kwargs: Further arguments of `wandb.init`, such as `project`, `name`, `config`, `mode`.
    """

    def __init__(self, window_size: int = 20, **kwargs: Any) -> None:
        super().__init__("wandb", "Error", window_size)
        self._kwargs = kwargs

    def _open(self, run_id: str) -> Any:
        # A run of the script's own is left alone.
        run = self._library.init(id=run_id, resume="allow", reinit="create_new", **self._kwargs)
        self._next_step = run.step
        return run

    def _log(self, iteration: int, record: dict[str, Any]) -> None:
        if iteration >= self._next_step:
            self._next_step = iteration
            values = {
                name: self._library.Image(value) if isinstance(value, np.ndarray) else value
                for name, value in record.items()
            }
            self._run.log(values, step=iteration)

    def _finish(self, run: Any) -> None:
        run.finish()
