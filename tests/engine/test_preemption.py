"""How a run leaves; F13 through a real process is in test_fault_signals.py."""

import logging
import signal
from pathlib import Path

import pytest

from tests.engine.fake_slurm import FakeSlurm
from trainkit.engine import preemption
from trainkit.engine.preemption import PreemptedExit, leave
from trainkit.utils import comm
from trainkit.utils.stop_signals import Interruption


def by(signum: signal.Signals) -> Interruption:
    return Interruption(signum.name, 128 + signum)


def make_slurm(
    monkeypatch: pytest.MonkeyPatch, folder: Path, then: str = "exit 0", **environment: str
) -> FakeSlurm:
    """Makes a job of this process."""
    slurm = FakeSlurm(folder, then)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**slurm.environment, **environment}.items():
        monkeypatch.setenv(name, value)
    return slurm


def test_a_run_without_an_interruption_does_not_leave() -> None:
    leave(None)


def test_a_stop_without_a_signal_is_said_and_returns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        leave(Interruption("limit of time"))
    assert "was interrupted: limit of time. It goes on with --resume" in caplog.text


def test_ctrl_c_raises_what_python_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        leave(by(signal.SIGINT))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_other_signals_end_the_process_with_their_code(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(PreemptedExit) as exit_:
        leave(by(signum))
    assert exit_.value.code == 128 + signum


def test_slurms_notice_has_the_job_queued_again_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm = make_slurm(monkeypatch, tmp_path)
    with pytest.raises(PreemptedExit) as exit_:
        leave(by(signal.SIGUSR1))
    assert (slurm.calls, exit_.value.code) == (["requeue 4711"], 138)


def test_of_an_array_the_task_is_queued_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}
    slurm = make_slurm(monkeypatch, tmp_path, **task)
    with pytest.raises(PreemptedExit):
        leave(by(signal.SIGUSR1))
    assert slurm.calls == ["requeue 4700_11"]


def test_only_rank_0_asks_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm = make_slurm(monkeypatch, tmp_path)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    with pytest.raises(PreemptedExit):
        leave(by(signal.SIGUSR1))
    assert slurm.calls == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_another_signal_may_mean_that_the_job_is_not_wanted(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm = make_slurm(monkeypatch, tmp_path)
    with pytest.raises((PreemptedExit, KeyboardInterrupt)):
        leave(by(signum))
    assert slurm.calls == []


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("echo 'Job may not be requeued' >&2; exit 1", "Job may not be requeued"),
        ("exit 3", "non-zero exit status 3"),
        ("exec sleep 60", "timed out"),
    ],
)
def test_a_refusal_is_said_and_the_run_leaves_all_the_same(
    then: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_slurm(monkeypatch, tmp_path, then)
    monkeypatch.setattr(preemption, "_REQUEUE_SECONDS", 0.5)
    with pytest.raises(PreemptedExit) as exit_:
        leave(by(signal.SIGUSR1))
    assert exit_.value.code == 138
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    text = record.getMessage()
    assert text.startswith("Slurm did not requeue job 4711: ")
    assert said in text
    assert text.endswith("Queue it again yourself.")


def test_a_machine_without_scontrol_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_slurm(monkeypatch, tmp_path, PATH=str(tmp_path / "nothing"))
    with pytest.raises(PreemptedExit):
        leave(by(signal.SIGUSR1))
    assert "did not requeue job 4711: [Errno 2] No such file or directory: 'scontrol'" in (
        caplog.text
    )
