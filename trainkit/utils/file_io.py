"""Files: one path manager for reading from anywhere, and writes that are whole or absent."""

import os
from pathlib import Path

from iopath.common.file_io import HTTPURLHandler, PathManagerFactory

PathManager = PathManagerFactory.get("trainkit")
"""Opens local paths and http(s) addresses; register handlers for other schemes on it."""

if not any(isinstance(h, HTTPURLHandler) for h in PathManager._path_handlers.values()):
    PathManager.register_handler(HTTPURLHandler())


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in a folder durable: a rename is, once its folder has been synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Gives a finished, synced file its final name, durably; readers see the old or the new."""
    os.replace(temporary, path)
    sync_folder(Path(path).parent)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes a small UTF-8 text file that is never half there, not even after a power loss."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)
