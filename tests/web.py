"""A web server on this machine, for the tests of files that come from elsewhere."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Web:
    """What a folder looks like from outside.

    Args:
        address: Where its files are, such as "http://127.0.0.1:1234".
        requests: The paths that were asked for so far.
    """

    def __init__(self, folder: Path, address: str, requests: list[str]) -> None:
        self.folder = folder
        self.address = address
        self.requests = requests

    def with_hash(self, name: str) -> str:
        """The address of a file, with its SHA-256."""
        digest = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        return f"{self.address}/{name}#sha256={digest}"


@contextlib.contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Serves a folder; what is fetched is cached beside it, in "cache"."""
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None: ...

    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("FVCORE_CACHE", str(folder.parent / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Web(folder, f"http://127.0.0.1:{server.server_port}", requests)
        finally:
            server.shutdown()
            thread.join()
