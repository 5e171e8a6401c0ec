"""What a command-line tool prints and returns when a run ends in an error."""

import contextlib
import os
import sys
from collections.abc import Iterator

from trainkit.evaluation.testing import ResultsMismatchError
from trainkit.utils.errors import USER_ERRORS

MESSAGE_ERRORS = (*USER_ERRORS, ResultsMismatchError, FloatingPointError)
"""Errors whose text says all; a traceback would hide it."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


@contextlib.contextmanager
def exit_codes(debug: bool = False) -> Iterator[None]:
    """Turns an error that a user can mend, or unexpected results, into a message and exit code 1.

    Any other error keeps its traceback; Ctrl-C exits with 130.

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
        # torchrun's; the process group is gone by now.
        rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"{type(e).__name__}{rank}: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
