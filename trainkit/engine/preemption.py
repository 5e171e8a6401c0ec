"""How a run leaves that a signal ended: exit codes for schedulers, and Slurm's requeue."""

import logging
import os
import signal
import subprocess

from trainkit.utils import comm
from trainkit.utils.stop_signals import Interruption

logger = logging.getLogger(__name__)

_REQUEUE_SECONDS = 60


class PreemptedExit(SystemExit):
    """Ends the process with 128 + the signal's number, after the run was saved."""


def leave(interruption: Interruption | None) -> None:
    """Raises what ends the process of a run that a signal interrupted, once everything is saved.

    After SIGUSR1 under Slurm, rank 0 first has the job queued again. Slurm sends that signal when
    it is asked to (`#SBATCH --signal=USR1@120`); SIGTERM may mean that somebody cancelled the job.

    Args:
        interruption: Why the run leaves; nothing is raised if it was no signal.

    Raises:
        KeyboardInterrupt: For SIGINT.
        PreemptedExit: For every other signal.
    """
    if interruption is None:
        return
    logger.info("The run was interrupted: %s. It goes on with --resume.", interruption.reason)
    exit_code = interruption.exit_code
    if exit_code == 0:
        return
    if exit_code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if exit_code == 128 + signal.SIGUSR1 and comm.is_main_process():
        _requeue()
    raise PreemptedExit(exit_code)


def _requeue() -> None:
    """Has Slurm queue this job again; a failure is logged, since the checkpoint is safe anyhow."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    logger.info("Having Slurm requeue job %s; its command goes on only with --resume.", job)
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_REQUEUE_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or str(e)).strip()
        logger.error("Slurm did not requeue job %s: %s. Queue it again yourself.", job, said)
