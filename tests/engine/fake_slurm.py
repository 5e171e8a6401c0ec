"""A stand-in for Slurm: a job's environment, and an `scontrol` that notes what it is asked for."""

import os
from pathlib import Path

JOB = "4711"


class FakeSlurm:
    """Writes `scontrol` into a folder.

    Args:
        folder: Where; it comes first on the PATH of the environment.
        then: What the shell script does after it has noted its arguments.

    Attributes:
        environment: What a job would find.
    """

    def __init__(self, folder: Path, then: str = "exit 0") -> None:
        folder.mkdir(exist_ok=True)
        self._calls = folder / "calls"
        script = folder / "scontrol"
        script.write_text(f'#!/bin/sh\necho "$@" >> {self._calls}\n{then}\n')
        script.chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "SLURM_JOB_ID": JOB}

    @property
    def calls(self) -> list[str]:
        """The arguments of each call."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []
