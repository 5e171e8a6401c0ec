"""Free space: whether coming checkpoints will fit, said while there is time to make room."""

import contextlib
import glob
import logging
import math
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def free_bytes(folder: Path) -> int | None:
    """Returns the bytes free where a folder is, or will be made; None if nobody can tell."""
    try:
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
    except OSError:
        return None


class SpaceWatch:
    """Warns that coming checkpoints will not fit: once, and again when even fewer will.

    Quotas, and what others are going to write, it cannot know. It never raises.

    Args:
        folder: Where the checkpoints go; it need not exist yet.
        file_prefix: Beginning of their names.
        checkpoint_bytes: About what one takes.
    """

    def __init__(self, folder: Path, file_prefix: str, checkpoint_bytes: int) -> None:
        self._folder = folder
        self._prefix = file_prefix
        self._bytes = max(1, checkpoint_bytes)
        self._num_missing: dict[str, int] = {}

    def check_run(self, count: int) -> None:
        """Checks for all checkpoints that a run will hold at once; some may be there already."""
        what = f"The {count} checkpoints that this run may hold at once"
        reusable = (self._sizes(pattern) for pattern in ("[0-9]*", "best", "final"))
        self._warn_if_short(what, count, sum(map(sum, reusable)))

    def check_save(self, max_to_keep: int | None) -> None:
        """Checks for a numbered checkpoint about to be saved, and the next one.

        Args:
            max_to_keep: Numbered checkpoints that stay after a save; None keeps all.
        """
        sizes = self._sizes("[0-9]" * 7 + "*")
        num_deleted = 0 if max_to_keep is None else max(0, len(sizes) + 1 - max_to_keep)
        self._warn_if_short("This checkpoint and the next one", 2, sum(sizes[:num_deleted]))

    def _sizes(self, pattern: str) -> list[int]:
        """Returns the bytes of those that are there, by name: the earliest iteration first."""
        sizes = []
        for path in sorted(self._folder.glob(f"{glob.escape(self._prefix)}_{pattern}.pth")):
            with contextlib.suppress(OSError):
                sizes.append(path.stat().st_size)
        return sizes

    def _warn_if_short(self, what: str, count: int, reusable: int) -> None:
        needed, free = count * self._bytes - reusable, free_bytes(self._folder)
        missing = 0 if free is None else max(0, math.ceil((needed - free) / self._bytes))
        if missing > self._num_missing.get(what, 0):
            logger.warning(
                f"{what}, of about {self._bytes:,} bytes each, need {needed:,} more bytes in "
                f"{self._folder}, where {free:,} are free. Make room, lower CHECKPOINT.MAX_TO_KEEP "
                "or set another OUTPUT_DIR before a save fails."
            )
        self._num_missing[what] = missing
