"""Files: one path manager for reading from anywhere, and writes that are whole or absent."""

import hashlib
import os
import re
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from iopath.common.download import download
from iopath.common.file_io import (
    HTTPURLHandler,
    NativePathHandler,
    PathHandler,
    PathManagerFactory,
    file_lock,
    get_cache_dir,
)

from trainkit.utils.errors import ConfigError

__all__ = [
    "PathHandler",
    "PathManager",
    "leads_out",
    "publish",
    "sync_folder",
    "write_atomically",
]

PathManager = PathManagerFactory.get("trainkit")
"""Opens local paths and web addresses with a SHA-256; register handlers for other schemes on it."""


class _NativeHandler(NativePathHandler):
    """Paths of this machine; iopath's own handler forgets `set_cwd` in these two."""

    def _rm(self, path: str, **kwargs: Any) -> None:
        super()._rm(self._get_path_with_cwd(path), **kwargs)

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        super()._mkdirs(self._get_path_with_cwd(path), **kwargs)


class _WebHandler(HTTPURLHandler):
    """Opens web addresses with a SHA-256, by which files are cached.

    iopath's own handler caches by the path in the address: hosts collide, and "../" leads out.
    """

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        self._check_kwargs(kwargs)
        url, _, expected = path.partition("#sha256=")
        expected = expected.lower()
        if not re.fullmatch("[0-9a-f]{64}", expected):
            raise ConfigError(
                f"{path!r} is on the web, from where only a file that is known is loaded. Append "
                "#sha256= and its SHA-256, 64 hexadecimal digits, as `sha256sum FILE` prints it."
            )
        name = expected + os.path.splitext(urlparse(url).path)[1]
        local = Path(get_cache_dir(cache_dir), name)
        with file_lock(os.fspath(local)):
            found = _sha256(local) if local.is_file() and not force else ""
            if found != expected:
                local.unlink(missing_ok=True)
                download(url, os.fspath(local.parent), filename=name)
                found = _sha256(local)
            if found != expected:
                local.unlink()
                raise ConfigError(
                    f"The file at {url} has the SHA-256 {found}, but {expected} is expected, so it "
                    "was removed. Check the address; give the new SHA-256 only if you trust it."
                )
        return os.fspath(local)


if not any(isinstance(h, HTTPURLHandler) for h in PathManager._path_handlers.values()):
    PathManager.register_handler(_WebHandler())
    PathManager._native_path_handler = _NativeHandler()


def leads_out(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a link to something outside of the folder that it lies in."""
    path = Path(path)
    return path.is_symlink() and Path(os.path.realpath(path)).parent != path.parent.resolve()


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
    temporary.unlink(missing_ok=True)
    # Exclusive, so that not even a link of this name is followed.
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(partial(file.read, 1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
