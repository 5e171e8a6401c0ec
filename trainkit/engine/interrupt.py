"""Ctrl-C as a request: the step is finished and saved before the run leaves."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

logger = logging.getLogger(__name__)

ONE_PRESS_SECONDS = 0.3
"""Signals this close are one Ctrl-C: a process gets a terminal's, and the launcher's copy of it."""


@contextlib.contextmanager
def interrupt_as_request(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Turns the first Ctrl-C inside the block into a request; a second one interrupts at once.

    Args:
        request_stop: Called with the reason, between two bytecodes of the main thread.

    Raises:
        KeyboardInterrupt: After the block, if there was a Ctrl-C in it. In other threads than the
            main one, which Python hands no signals, the block runs as it is.
    """
    previous = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or previous is not signal.default_int_handler:
        yield
        return
    interrupted_at: float | None = None

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted_at
        now = time.monotonic()
        if interrupted_at is None:
            interrupted_at = now
            logger.warning("Ctrl-C: stopping after this step. Again stops at once, unsaved.")
            request_stop("Ctrl-C")
        elif now - interrupted_at > ONE_PRESS_SECONDS:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted_at is not None:
        raise KeyboardInterrupt
