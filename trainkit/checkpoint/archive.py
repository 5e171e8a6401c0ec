"""What the zip archive of a checkpoint may look like: nothing in it grows when it is read."""

import os
import struct
import zipfile
from pathlib import Path

from trainkit.checkpoint.manifest import END_RECORD_BYTES, DamagedError

# For archives above 4 GB there are two more records before the end record (APPNOTE.TXT, 4.3.14).
_RECORD64_BYTES, _LOCATOR64_BYTES = 56, 20


def check_archive(path: str | os.PathLike[str], record_at: int) -> None:
    """Refuses a zip archive that `torch.save` cannot have written.

    Its entries are stored as they are, so that together they are no longer than the file; and its
    directory lies right before its end, where every reader of zip archives looks for it.

    Args:
        path: The file, which may come from anybody.
        record_at: Offset of the archive's end record.

    Raises:
        DamagedError: If it is damaged, compressed, encrypted, or its entries overlap.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries, directory_at = archive.infolist(), archive.start_dir
        _check_end(path, record_at, directory_at)
    # What Python raises for an archive made to confuse it; the last for offsets beyond 64 bits.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as e:
        raise DamagedError(f"its zip archive is damaged: {e}") from None
    if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
        raise DamagedError("its zip archive is compressed or encrypted, as torch.save writes none")
    claimed = sum(max(e.file_size, e.compress_size) for e in entries)
    if claimed > directory_at:
        raise DamagedError(
            f"its zip archive claims {claimed:,} bytes of data and has room for {directory_at:,}"
        )


def _check_end(path: str | os.PathLike[str], record_at: int, directory_at: int) -> None:
    with Path(path).open("rb") as file:
        file.seek(max(0, record_at - _LOCATOR64_BYTES - _RECORD64_BYTES))
        end = file.read(record_at + END_RECORD_BYTES - file.tell())
    locator64 = end[:-END_RECORD_BYTES][-_LOCATOR64_BYTES:]
    if locator64.startswith(b"PK\x06\x07"):
        ends_at = record_at - _LOCATOR64_BYTES - _RECORD64_BYTES
        size, offset = struct.unpack_from("<QQ", end, 40)
        (record64_at,) = struct.unpack_from("<Q", locator64, 8)
    else:
        ends_at = record64_at = record_at
        size, offset = struct.unpack_from("<II", end, len(end) - 10)
    if record64_at != ends_at or offset != directory_at or offset + size != ends_at:
        raise ValueError("readers would find more than one directory in it")
