"""`TensorboardXWriter`: metrics, images and histograms as TensorBoard events."""

import os
from typing import Any

from trainkit.utils.errors import ConfigError
from trainkit.utils.events.storage import EventStorage, get_event_storage
from trainkit.utils.events.writer import EventWriter, NewValues


class TensorboardXWriter(EventWriter):
    """Writes to a TensorBoard folder, through torch's `SummaryWriter`.

    TensorBoard is told to hide what a killed run wrote into the folder after the checkpoint, and
    what an earlier run did.

    Args:
        log_dir: The folder.
        window_size: Iterations that the median of a smoothed scalar covers.
        kwargs: Further arguments of `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], window_size: int = 20, **kwargs: Any
    ) -> None:
        self._log_dir = os.fspath(log_dir)
        self._kwargs = kwargs
        self._new_values = NewValues(window_size)
        self._writer: Any = None

    def reset(self) -> None:
        """Takes nothing for written."""
        self._new_values.reset()

    def write(self) -> None:
        """Writes the new scalars, and the images and histograms that wait.

        Raises:
            ConfigError: If tensorboard is not installed.
        """
        storage = get_event_storage()
        writer = self._writer or self._open(storage)
        for iteration, values in self._new_values.take(storage).items():
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
        for name, image, iteration in storage.images:
            writer.add_image(name, image, iteration)
        for histogram in storage.raw_histograms:
            writer.add_histogram_raw(**histogram)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what was written of each scalar."""
        if self._writer is not None:
            self._writer.flush()
        return self._new_values.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after what was written when the checkpoint was saved."""
        self._new_values.load_state_dict(state)

    def _open(self, storage: EventStorage) -> Any:
        try:
            # Slow to import, and an extra.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "TensorboardXWriter needs tensorboard: pip install 'trainkit[tensorboard]', or "
                "leave the writer out of build_writers."
            ) from None
        purge_step = self._new_values.next_iter(storage)
        self._writer = SummaryWriter(self._log_dir, purge_step=purge_step, **self._kwargs)
        return self._writer
