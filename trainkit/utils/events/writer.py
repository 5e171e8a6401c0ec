"""What every writer is, and which values a writer has yet to write."""

import importlib
import secrets
from typing import Any

import numpy as np
import torch

from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage, get_event_storage, has_event_storage


class EventWriter:
    """Brings the storage's metrics to a file, a screen or a service.

    A writer whose output must continue after a resume as if nothing had happened also overrides
    `state_dict` and `load_state_dict`; its state travels in checkpoints.
    """

    def write(self) -> None:
        """Writes what is new in the current storage.

        Raises:
            NotImplementedError: If a writer does not say how.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Writes nothing more; the next `write` opens again."""

    def reset(self) -> None:
        """Forgets what was written, because another run starts from its beginning."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the output stands, after making what was written durable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from where the output stood."""


class NewValues:
    """Picks the values that were not written yet, each one once.

    Smoothed scalars, and those put at every iteration such as the learning rate, give their latest
    value; those put now and then, such as evaluation results, give every value.

    Args:
        window_size: Iterations that the median of a smoothed scalar covers.
    """

    def __init__(self, window_size: int) -> None:
        self._window_size = window_size
        self.reset()

    def reset(self) -> None:
        """Takes nothing for written."""
        self._written: dict[str, int] = {}
        self._start_iter: int | None = None

    def next_iter(self, storage: EventStorage) -> int:
        """Returns the iteration after the newest that was written; at first, where the run starts.

        Args:
            storage: The run's, which says where it starts.
        """
        if self._start_iter is None:
            self._start_iter = storage.start_iter
        return max(self._written.values(), default=self._start_iter - 1) + 1

    def state_dict(self) -> dict[str, Any]:
        """Returns what was written, and since when."""
        # A run that was cut before its first write still has to write all since its own start.
        if self._start_iter is None and has_event_storage():
            self._start_iter = get_event_storage().start_iter
        return {"written": dict(self._written), "start_iter": self._start_iter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after what was written."""
        self._written = dict(state["written"])
        self._start_iter = state["start_iter"]

    def take(self, storage: EventStorage) -> dict[int, dict[str, float]]:
        """Returns the new values by iteration and name, and counts them as written."""
        if self._start_iter is None:
            self._start_iter = storage.start_iter
        taken: dict[int, dict[str, float]] = {}
        hints = storage.smoothing_hints()
        for name, history in storage.histories().items():
            last_written = self._written.get(name, self._start_iter - 1)
            # The newest first.
            new = history.after(last_written)
            if not new:
                continue
            iteration = new[0][1]
            # A smoothed one that misses few iterations, or begins late, is shown by its median.
            begin = new[-1][1] - 1 if hints[name] and name not in self._written else last_written
            if iteration - begin - len(new) < (len(new) if hints[name] else 1):
                num_smoothed = storage.count_samples(name, self._window_size) if hints[name] else 1
                new = [(history.median(num_smoothed), iteration)]
            for value, i in new:
                taken.setdefault(i, {})[name] = value
            self._written[name] = iteration
        return dict(sorted(taken.items()))


class RunWriter(EventWriter):
    """Writes scalars and images to an experiment tracker, as a run that a resume goes on with.

    What a killed run wrote after the checkpoint stays there, and is not written again.

    Args:
        library: Of the tracker, an extra by the same name.
        failure: What the library raises. It becomes an OSError, which `PeriodicWriter` may survive;
            the next write tries again.
        window_size: Iterations that the median of a smoothed scalar covers.

    Raises:
        ConfigError: If the library is not installed.
    """

    def __init__(self, library: str, failure: str, window_size: int) -> None:
        try:
            self._library: Any = importlib.import_module(library)
        except ImportError:
            raise ConfigError(
                f"{type(self).__name__} needs {library}: pip install 'trainkit[{library}]', or "
                "leave the writer out of build_writers."
            ) from None
        self._failure: type[Exception] = getattr(self._library, failure)
        self._new_values = NewValues(window_size)
        self._run: Any = None
        self.reset()

    def reset(self) -> None:
        """Has the next write begin another run."""
        self.close()
        self._new_values.reset()
        # Known before the tracker is, so that every checkpoint holds it.
        self._run_id = secrets.token_hex(8)

    def write(self) -> None:
        """Writes the new scalars, and the images that wait.

        Raises:
            OSError: If the tracker cannot be reached, or refuses.
        """
        storage, before = get_event_storage(), self._new_values.state_dict()
        records: dict[int, dict[str, Any]] = dict(self._new_values.take(storage))
        for name, image, iteration in storage.images:
            records.setdefault(iteration, {})[name] = _pixels(image)
        try:
            self._run = self._run or self._open(self._run_id)
            for iteration, record in sorted(records.items()):
                self._log(iteration, record)
        except self._failure as e:
            self._new_values.load_state_dict(before)
            raise OSError(f"{type(self).__name__} cannot write: {e}") from e

    def close(self) -> None:
        """Ends the run, until the next write goes on with it."""
        run, self._run = self._run, None
        try:
            if run is not None:
                self._finish(run)
        except self._failure as e:
            raise OSError(f"{type(self).__name__} cannot end its run: {e}") from e

    def state_dict(self) -> dict[str, Any]:
        """Returns which run it is, and what was written of each scalar."""
        return {"run_id": self._run_id, "new_values": self._new_values.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with that run."""
        self.close()
        self._run_id = state["run_id"]
        self._new_values.load_state_dict(state["new_values"])

    def _open(self, run_id: str) -> Any:
        """Begins the run of this name, or goes on with it."""
        raise NotImplementedError

    def _log(self, iteration: int, record: dict[str, Any]) -> None:
        """Writes numbers and images, uint8 of shape (H, W, 3) or (H, W), by name."""
        raise NotImplementedError

    def _finish(self, run: Any) -> None:
        raise NotImplementedError


def _pixels(image: np.ndarray[Any, Any] | torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = torch.as_tensor(image).detach().cpu()
    if tensor.is_floating_point():
        tensor = (tensor.float() * 255).round().clamp(0, 255)
    pixels: np.ndarray[Any, Any] = tensor.to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    return pixels
