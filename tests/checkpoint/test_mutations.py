"""F23: 2,000 mutated files are survived or explained in little time and memory, and run no code."""

import shutil
from pathlib import Path

import pytest
from torch import multiprocessing as mp

from tests.checkpoint.mutated_runs import CASES, outcomes, run_cases

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# Ends that each kind of case must have come to somewhere, so that it is known to try something.
EXPECTED = {
    "damaged": {"older"},
    "forged": {"older", "loaded", "CheckpointError"},
    "older_format": {"loaded", "CheckpointError"},
    "beside": {"newest", "newest, finished"},
    "config": {"merged", "ConfigError"},
}


def test_there_are_2000_cases() -> None:
    assert sum(count for _, count in CASES.values()) == 2000


@pytest.mark.parametrize("name", CASES)
def test_f23_mutated_files_are_survived_or_explained(tmp_path: Path, name: str) -> None:
    report = tmp_path / "report.txt"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.mutated_runs"])
    process = context.Process(
        target=run_cases, args=(tmp_path / "cases", name, range(CASES[name][1]), report)
    )
    process.start()
    process.join(300)
    lines = report.read_text().splitlines()
    assert process.exitcode == 0, f"{lines[-1]} the process ended with {process.exitcode}"
    failed = [line for line in lines if ": FAILED " in line]
    assert not failed, "\n".join([f"{len(failed)} failed:", *failed[:20]])
    ends = outcomes(report)
    assert set(ends) == EXPECTED[name]
    assert ends.total() == CASES[name][1]
    print(f"{name}: {dict(ends)}")
    shutil.rmtree(tmp_path / "cases")
