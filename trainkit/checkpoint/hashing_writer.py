"""The file that `torch.save` sees while a checkpoint is written."""

import hashlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO

from trainkit.checkpoint.manifest import END_RECORD_BYTES

_CHUNK_BYTES = 1 << 20
# Chunks that may wait for the hash.
_MAX_WAITING = 4


class HashingWriter:
    """Hashes in a second thread while it writes in this one, and withholds the zip's end record.

    The first error of either thread is raised when the `with` block ends, not before: torch would
    answer an error in the middle of a file with one of its own.

    Args:
        file: Where the bytes go, all but the last 22, which wait for `close_with`.

    Attributes:
        size: Bytes taken so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file = file
        self._pending = bytearray()
        self._digest = hashlib.sha256()
        self._error: BaseException | None = None
        self._chunks: queue.Queue[bytearray | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def __enter__(self) -> "HashingWriter":
        self._thread.start()
        return self

    def write(self, data: memoryview) -> int:
        """Takes the next bytes, a copy: torch lends its memory for this call only."""
        for start in range(0, len(data), _CHUNK_BYTES):
            self._pending += data[start : start + _CHUNK_BYTES]
            if len(self._pending) >= _CHUNK_BYTES + END_RECORD_BYTES:
                self._noting(self._pass_on)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Does nothing: what is pending has to wait for the comment."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._noting(self._pass_on)
        self._chunks.put(None)
        self._thread.join()
        # Taken off self: an error that stays there would hold the frames that hold self.
        first, self._error = self._error, None
        try:
            if first is not None:
                raise first
        finally:
            del first, error, traceback

    def hexdigest(self) -> str:
        """Returns the SHA-256 of all bytes, the withheld ones included."""
        digest = self._digest.copy()
        digest.update(self._pending)
        return digest.hexdigest()

    def close_with(self, comment: bytes) -> None:
        """Writes the end record, with the comment's length, and the comment."""
        assert self._pending.startswith(b"PK\x05\x06"), "torch.save ends with this record"
        assert self._pending.endswith(b"\0\0"), "torch.save writes no comment"
        self._file.write(self._pending[:-2] + len(comment).to_bytes(2, "little") + comment)

    def _pass_on(self) -> None:
        cut = max(0, len(self._pending) - END_RECORD_BYTES)
        chunk, self._pending = self._pending[:cut], self._pending[cut:]
        # After an error the rest is discarded.
        if self._error is None:
            self._chunks.put(chunk)
            self._file.write(chunk)

    def _hash(self) -> None:
        # Takes chunks even after an error, so that the writing thread never waits for ever.
        while (chunk := self._chunks.get()) is not None:
            self._noting(self._digest.update, chunk)

    def _noting(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as e:
            self._error = self._error or e
