"""What a command-line tool prints and returns when a run ends in an error."""

import contextlib
import sys
from collections.abc import Iterator

from trainkit.engine.failures import MESSAGE_ERRORS

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


@contextlib.contextmanager
def exit_codes(debug: bool = False) -> Iterator[None]:
    """Turns an error that a user can mend, or unexpected results, into a message and exit code 1.

    Any other error keeps its traceback; Ctrl-C exits with 130, and SystemExit with its own code, as
    143 after SIGTERM.

    Args:
        debug: Whether to keep every traceback.

    Raises:
        SystemExit: Instead of the error.
    """
    try:
        yield
    except MESSAGE_ERRORS as e:
        if debug:
            raise
        # The notes say where the run failed, and what did besides.
        lines = [f"{type(e).__name__}: {e}", *getattr(e, "__notes__", [])]
        print("\n".join(lines), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
