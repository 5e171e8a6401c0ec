"""F11, F12, F13: a signal to the process group, at any time, twice, and under Slurm.

Each run gets real signals in a process of its own, and its resume ends like an unbroken run.
"""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fake_slurm import FakeSlurm
from tests.engine.faulty_run import (
    Fault,
    Sample,
    assert_same_end,
    dawdle,
    get,
    get_as_group,
    get_later,
    hang,
    printed,
    saved,
    start,
)
from trainkit.checkpoint.format import verify

pytestmark = pytest.mark.faults

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1

WORKERS = ["DATALOADER.NUM_WORKERS", 2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert start(folder) == [0]
    return folder


def assert_resumes(folder: Path, unbroken: Path, *opts: Any) -> None:
    assert start(folder, list(opts), resume=True) == [0]
    assert_same_end(folder, unbroken)


@pytest.mark.parametrize("place", ["before_train", "before_step", "evaluation", "save"])
def test_f11_a_signal_to_the_process_group_saves_though_workers_get_it_too(
    tmp_path: Path, unbroken: Path, place: str
) -> None:
    iteration = {"before_train": 0, "before_step": 8, "evaluation": 7, "save": 11}[place]
    fault = Fault(place, iteration, partial(get_as_group, TERM))
    assert start(tmp_path, WORKERS, fault) == [143]
    assert place == "before_train" or saved(tmp_path)[-1] == iteration
    assert_resumes(tmp_path, unbroken, *WORKERS)


# Where the signal comes, in which iteration, the newest checkpoint that is then left, and how many
# evaluations have come to their end.
PLACES = [
    ("before_train", 0, None, 0),
    ("before_step", 0, 0, 0),
    ("evaluation", 3, 3, 0),
    ("save", 5, 5, 1),
    ("judging", 7, 7, 2),
    ("before_step", 8, 8, 2),
    ("before writing", 9, 9, 2),
    ("evaluation", 11, 11, 2),
    ("before_step", 17, 17, 4),
    ("save", 17, 17, 4),
    ("evaluation", 18, 17, 4),
    ("judging", 18, 17, 5),
]


@pytest.mark.parametrize(("place", "iteration", "newest", "num_judged"), PLACES)
def test_f12_a_signal_at_any_time_leaves_one_state_that_a_resume_goes_on_from(
    tmp_path: Path,
    unbroken: Path,
    place: str,
    iteration: int,
    newest: int | None,
    num_judged: int,
) -> None:
    assert start(tmp_path, [], Fault(place, iteration, partial(get, TERM))) == [143]
    assert saved(tmp_path)[-1:] == ([] if newest is None else [newest])
    assert printed(tmp_path).count("Judging") == num_judged
    assert_resumes(tmp_path, unbroken)


def test_f12_a_signal_to_one_rank_has_all_leave_the_evaluation(tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert start(unbroken, world_size=2) == [0, 0]
    for iteration, newest, num_judged in ((7, 7, 1), (18, 17, 3)):
        fault = Fault("evaluation", iteration, partial(get, TERM), ranks=(1,))
        assert start(broken, [], fault, world_size=2, resume=True) == [143, 143]
        assert saved(broken)[-1] == newest
        assert [printed(broken, rank).count("Judging") for rank in (0, 1)] == [num_judged] * 2
    assert start(broken, world_size=2, resume=True) == [0, 0]
    assert_same_end(broken, unbroken)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("iteration", [0, 8])
def test_f12_a_signal_during_a_slow_fetch_does_not_wait_for_it(
    tmp_path: Path, unbroken: Path, num_workers: int, iteration: int
) -> None:
    opts = ["DATALOADER.NUM_WORKERS", num_workers]
    fault = Fault("before_step", iteration, partial(get_later, TERM))
    assert start(tmp_path, opts, fault, sample=Sample(iteration, 0, "slow")) == [143]
    assert saved(tmp_path)[-1:] == ([iteration - 1] if iteration else [])
    assert_resumes(tmp_path, unbroken, *opts)


@pytest.mark.parametrize(("signum", "code"), [(INT, 130), (USR1, 138)])
def test_f12_every_signal_saves_and_has_its_exit_code(
    tmp_path: Path, unbroken: Path, signum: int, code: int
) -> None:
    assert start(tmp_path, [], Fault("before_step", 8, partial(get, signum))) == [code]
    assert saved(tmp_path)[-1] == 8
    assert_resumes(tmp_path, unbroken)


def test_f12_signals_in_every_run_lose_nothing(tmp_path: Path, unbroken: Path) -> None:
    # The second run gets one in the evaluation that the first one has left.
    places = [("evaluation", 3), ("evaluation", 3), ("before_step", 4), ("save", 5)]
    for place, iteration in [*places, ("before_train", 6), ("evaluation", 18), ("evaluation", 18)]:
        fault = Fault(place, iteration, partial(get, TERM))
        assert start(tmp_path, [], fault, resume=True) == [143], place
    assert_resumes(tmp_path, unbroken)


@pytest.mark.parametrize(
    ("place", "iteration", "signals", "code"),
    [
        ("before_step", 8, (TERM, TERM), 143),
        ("save", 11, (TERM, TERM), 143),
        ("evaluation", 7, (USR1, USR1), 138),
        ("before_step", 8, (INT, INT, INT), 130),
    ],
)
def test_f12_a_second_signal_forces_the_exit_of_a_run_that_hangs(
    tmp_path: Path,
    unbroken: Path,
    place: str,
    iteration: int,
    signals: tuple[int, ...],
    code: int,
) -> None:
    assert start(tmp_path, [], Fault(place, iteration, partial(hang, *signals))) == [code]
    assert "A second signal: leaving at once, unsaved." in printed(tmp_path)
    checkpoints = sorted(tmp_path.glob("model_*.pth"))
    assert [path.name for path in checkpoints] == ["model_0000005.pth", "model_best.pth"]
    assert all(verify(path).state == "verified" for path in checkpoints)
    assert_resumes(tmp_path, unbroken)


def test_f12_the_sigterm_that_follows_slurms_notice_is_not_a_second_signal(
    tmp_path: Path, unbroken: Path
) -> None:
    # That the job is to be requeued is not forgotten.
    assert start(tmp_path, [], Fault("save", 11, partial(get, USR1, TERM))) == [138]
    assert saved(tmp_path)[-1] == 11
    assert_resumes(tmp_path, unbroken)


def test_f12_a_second_ctrl_c_leaves_at_once_what_does_not_hang(
    tmp_path: Path, unbroken: Path
) -> None:
    assert start(tmp_path, [], Fault("before_step", 8, partial(get, INT, INT))) == [130]
    assert saved(tmp_path)[-1] == 5
    assert_resumes(tmp_path, unbroken)


ASYNC = ["CHECKPOINT.ASYNC", True]


@pytest.mark.parametrize("iteration", [5, 11])
def test_f20_a_signal_during_a_save_in_the_background_is_answered_after_it(
    tmp_path: Path, unbroken: Path, iteration: int
) -> None:
    fault = Fault("save", iteration, partial(dawdle, 0.5, TERM))
    assert start(tmp_path, ASYNC, fault) == [143]
    assert iteration in saved(tmp_path)
    assert_resumes(tmp_path, unbroken, *ASYNC)


# The second Ctrl-C ends training, or the step; what comes next meets no handler any more, or does.
@pytest.mark.parametrize(
    ("signals", "codes"), [((TERM, TERM), (143,)), ((INT, INT, TERM), (-TERM, 143))]
)
def test_f20_a_second_signal_forces_the_exit_although_a_save_hangs(
    tmp_path: Path, unbroken: Path, signals: tuple[int, ...], codes: tuple[int, ...]
) -> None:
    fault = Fault("save", 11, partial(hang, *signals))
    assert start(tmp_path, ASYNC, fault)[0] in codes
    checkpoints = sorted(tmp_path.glob("model_*.pth"))
    assert [path.name for path in checkpoints] == ["model_0000005.pth", "model_best.pth"]
    assert_resumes(tmp_path, unbroken, *ASYNC)


def test_f20_a_second_ctrl_c_ends_training_and_the_process_with_the_save_in_flight(
    tmp_path: Path, unbroken: Path
) -> None:
    fault = Fault("save", 5, partial(dawdle, 3.0, INT, INT))
    assert start(tmp_path, ASYNC, fault) == [130]
    # That of the first signal was not made.
    assert saved(tmp_path)[-1] == 5
    assert_resumes(tmp_path, unbroken, *ASYNC)


ARRAY = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}


@pytest.mark.parametrize(
    ("variables", "world_size", "asked"),
    [({}, 1, "requeue 4711"), (ARRAY, 1, "requeue 4700_11"), ({}, 2, "requeue 4711")],
)
def test_f13_slurms_notice_requeues_the_job_once_when_it_is_saved(
    tmp_path: Path, variables: dict[str, str], world_size: int, asked: str
) -> None:
    run = tmp_path / "run"
    slurm = FakeSlurm(tmp_path / "bin", f"ls {run} >> {tmp_path}/seen")
    fault = Fault("before_step", 8, partial(get, USR1), ranks=(0, 1))
    codes = start(
        run, [], fault, world_size=world_size, environment={**slurm.environment, **variables}
    )
    assert codes == [138] * world_size
    assert slurm.calls == [asked]
    # Several ranks have agreed before the next evaluation or save.
    newest = {1: 8, 2: 11}[world_size]
    assert f"model_{newest:07d}.pth" in (tmp_path / "seen").read_text().split()
    assert saved(run)[-1] == newest


def test_f13_slurm_that_refuses_or_a_cancelled_job_leave_a_saved_run(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "bin", "echo 'not allowed' >&2; exit 1")
    for name, signum in (("refused", USR1), ("cancelled", TERM)):
        fault = Fault("before_step", 8, partial(get, signum))
        codes = start(tmp_path / name, [], fault, environment=slurm.environment)
        assert codes == [128 + signum]
        assert saved(tmp_path / name)[-1] == 8
    assert slurm.calls == ["requeue 4711"]
    log = (tmp_path / "refused" / "printed.0").read_text()
    assert "did not requeue job 4711: not allowed. Queue it again yourself." in log
