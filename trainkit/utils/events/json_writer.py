"""`JSONWriter`: metrics as one JSON object for each line and iteration."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from trainkit.utils.errors import CheckpointWriteError
from trainkit.utils.events.storage import EventStorage, get_event_storage, has_event_storage
from trainkit.utils.events.writer import EventWriter, NewValues
from trainkit.utils.file_io import leads_out, write_atomically

_MAX_LINE_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class JSONWriter(EventWriter):
    """Writes metrics as lines such as `{"iteration": 19, "lr": 0.1, "total_loss": 1.2}`.

    Every line is valid JSON (a value that is not finite is null), and there is one for each
    iteration written, after a resume too: what a killed run wrote after the checkpoint is dropped,
    and written again by the run that resumes. A new run sets an old file aside, under the name
    `metrics.previous.json`.

    Args:
        json_file: Path of the file.
        window_size: Iterations that the median of a smoothed scalar covers.
    """

    def __init__(self, json_file: str | os.PathLike[str], window_size: int = 20) -> None:
        self._path = Path(json_file)
        self._file: BinaryIO | None = None
        self._new_values = NewValues(window_size)
        self.reset()

    def reset(self) -> None:
        """Takes the file for an earlier run's, to be set aside when this one writes."""
        self.close()
        self._new_values.reset()
        # The records of the last write, which late values of the same iterations join, and where
        # their lines start in the file.
        self._tail: dict[int, dict[str, float | None]] = {}
        self._tail_offset = 0
        # Where a resumed or closed file goes on; None for a file that this writer never had.
        self._resume_length: int | None = None

    def write(self) -> None:
        """Appends the new values of the current storage and hands them to the operating system."""
        storage = get_event_storage()
        taken = self._new_values.take(storage)
        if not taken:
            return
        file = self._file or self._open(storage)
        if self._tail and min(taken) <= max(self._tail):
            file.truncate(self._tail_offset)
            file.seek(self._tail_offset)
        else:
            self._tail = {}
            self._tail_offset = file.tell()
        for iteration, values in taken.items():
            record = self._tail.setdefault(iteration, {"iteration": iteration})
            record.update({k: v if math.isfinite(v) else None for k, v in values.items()})
        for _, record in sorted(self._tail.items()):
            line = json.dumps(record, sort_keys=True, allow_nan=False)
            file.write(line.encode("ascii") + b"\n")
        file.flush()

    def close(self) -> None:
        """Makes what was written durable and closes the file."""
        if self._file is not None:
            self._sync()
            self._file.close()
            self._file = None
            self._resume_length = self._path.stat().st_size

    def state_dict(self) -> dict[str, Any]:
        """Returns the length of the file so far, and what may still be added to its last lines.

        Raises:
            CheckpointWriteError: If the storage refuses what was written.
        """
        length = self._resume_length
        if length is None and has_event_storage():
            # Opened now, so that a resumed run does not take an earlier run's lines for its own.
            try:
                file = self._file or self._open(get_event_storage())
                self._sync()
            except OSError as e:
                raise CheckpointWriteError(
                    f"Cannot bring {self._path} to the disk: {e}. Free space there and go on "
                    "with --resume."
                ) from e
            length = file.tell()
        return {
            "length": length,
            "tail": {str(iteration): record for iteration, record in self._tail.items()},
            "tail_offset": self._tail_offset,
            "new_values": self._new_values.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from there: the next `write` cuts the file back to where it stood."""
        self.close()
        self._tail = {int(iteration): record for iteration, record in state["tail"].items()}
        self._tail_offset = state["tail_offset"]
        self._new_values.load_state_dict(state["new_values"])
        self._resume_length = state["length"]

    def _open(self, storage: EventStorage) -> BinaryIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if leads_out(self._path):
            logger.warning("%s was a link out of its folder: writing a file instead", self._path)
            self._path.unlink()
        if self._resume_length is not None:
            self._cut_to(self._resume_length, storage.start_iter)
            self._resume_length = None
        elif self._path.exists():
            self._drop_lines_from(storage.start_iter)
        self._file = self._path.open("ab")
        return self._file

    def _cut_to(self, length: int, start_iter: int) -> None:
        found = self._path.stat().st_size if self._path.exists() else 0
        if found > length:
            os.truncate(self._path, length)
        elif found < length:
            logger.warning(
                "%s has %d bytes but had %d when the checkpoint was saved: it was changed, or is "
                "not this run's own. Of its lines, those of earlier iterations are kept.",
                self._path,
                found,
                length,
            )
            self._tail = {}
            if found:
                self._drop_lines_from(start_iter)

    def _drop_lines_from(self, start_iter: int) -> None:
        """Keeps the lines of earlier iterations; a file without any is set aside."""
        with self._path.open("rb") as file:
            chunks = iter(lambda: file.readline(_MAX_LINE_BYTES), b"")
            lines = (line for chunk in chunks for line in chunk.splitlines())
            kept = [line.decode() for line in lines if _iteration_of(line) < start_iter]
        if kept:
            write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        elif self._path.stat().st_size:
            aside = self._path.with_name(f"{self._path.stem}.previous{self._path.suffix}")
            logger.warning("Moving the metrics of an earlier run to %s", aside)
            os.replace(self._path, aside)

    def _sync(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())


def _iteration_of(line: bytes) -> float:
    """Returns a line's iteration, or infinity for a line that was cut off or is not ours."""
    try:
        # As text: of bytes, json guesses the encoding.
        iteration = json.loads(line.decode("ascii"))["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return iteration if type(iteration) is int else math.inf
