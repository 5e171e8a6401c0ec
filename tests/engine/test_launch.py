"""Runs itself as a script that launches two processes again and again, and reports by JSON."""

import atexit
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import trainkit
from tests.engine.ranks_run import Fault, train
from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.engine.exit_codes import exit_codes
from trainkit.engine.hook_base import HookBase
from trainkit.engine.hooks.callback import CallbackHook
from trainkit.engine.hooks.checkpoint import PeriodicCheckpointer
from trainkit.engine.hooks.evaluation import EvalHook
from trainkit.engine.launch import _sruns_numbers, launch
from trainkit.engine.setup import create_ddp_model
from trainkit.engine.train_loop import SimpleTrainer
from trainkit.utils import comm
from trainkit.utils.errors import ConfigError


def test_one_process_is_a_plain_call_with_its_result() -> None:
    assert launch(lambda a, b: (a + b, dist.is_initialized()), args=(2, 3)) == (5, False)


@pytest.mark.parametrize("numbers", [(0, 1, 0), (-1, 1, 0), (1, 1, 1), (1, 2, -1), (2, 0, 0)])
def test_numbers_that_do_not_go_together_are_an_error(numbers: tuple[int, int, int]) -> None:
    text = rf"Cannot launch {numbers[0]} processes on machine {numbers[2]} of {numbers[1]}\."
    with pytest.raises(ConfigError, match=text):
        launch(lambda: None, *numbers)


@pytest.mark.parametrize("url", [None, "auto"])
def test_several_machines_need_an_address(url: str | None) -> None:
    with pytest.raises(ConfigError, match=r"pass --dist-url tcp://HOST:PORT, or start each with"):
        launch(lambda: None, 1, num_machines=2, dist_url=url)


@pytest.fixture
def torchrun_env(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.usefixtures("torchrun_env")
def test_d43_torchruns_group_is_joined_and_left_again_and_again() -> None:
    # The numbers given do not count.
    for _ in range(2):
        assert launch(lambda: (dist.is_initialized(), comm.get_world_size()), 8) == (True, 1)
        assert not dist.is_initialized()


@pytest.mark.usefixtures("torchrun_env")
def test_d43_a_machine_with_gpus_may_have_more_processes_on_its_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends: list[str] = []
    devices: list[int] = []
    join = dist.init_process_group

    def join_over_gloo(backend: str, **kwargs: Any) -> None:
        backends.append(backend)
        join("gloo", **kwargs)

    monkeypatch.setattr(dist, "init_process_group", join_over_gloo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    launch(lambda: None)
    assert backends == ["cpu:gloo,cuda:nccl"]
    assert devices == [1]


SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[03-05],cpu1",
}


def test_d43_a_task_of_srun_has_the_numbers_of_torchruns_processes() -> None:
    numbers = _sruns_numbers(SRUN)
    assert numbers == {
        "RANK": "6",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(20000 + 7 * 4711 % 20000),
    }
    assert _sruns_numbers({**SRUN, "SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a-1", "a-1"),
        ("a1,b2", "a1"),
        ("n[7,9]", "n7"),
        ("x.y,n[1-2]", "x.y"),
        ("n-[001]", "n-001"),
    ],
)
def test_the_tasks_of_srun_meet_at_the_first_node(nodes: str, first: str) -> None:
    assert _sruns_numbers({**SRUN, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_an_address_that_is_given_is_where_the_tasks_of_srun_meet() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    numbers = _sruns_numbers({**SRUN, **given})
    assert {name: numbers[name] for name in given} == given


@pytest.mark.parametrize(
    "env",
    [
        {},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        # A batch script, whose job may have many tasks.
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "7", "SLURM_PROCID": "0"},
        # torchrun, once on each node.
        {**SRUN, "RANK": "0", "WORLD_SIZE": "8"},
    ],
)
def test_other_processes_are_no_tasks_of_srun(env: dict[str, str]) -> None:
    assert _sruns_numbers(env) == {}


@pytest.mark.usefixtures("torchrun_env")
def test_the_group_is_left_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        launch(lambda: 1 // 0)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("torchrun_env")
def test_a_group_that_cannot_be_joined_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match=r"could not meet the others at env://: .*MASTER_ADDR"):
        launch(lambda: None)


def script_env() -> dict[str, str]:
    root = str(Path(trainkit.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def run_script(folder: Path, case: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, __file__, str(folder), case],
        env=script_env(),
        capture_output=True,
        text=True,
        timeout=300,
        # A group of its own, which a case may interrupt.
        start_new_session=True,
        check=False,
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("launch")
    done = run_script(folder, "all")
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_two_processes_know_each_other(reports: dict[str, Any]) -> None:
    assert [reports[f"who-{rank}"] for rank in range(2)] == [[2, 0, 0, 2], [2, 1, 1, 2]]
    assert reports["who"]["initialized"] is False


@pytest.mark.slow
def test_d43_what_rank_0_returned_is_returned(reports: dict[str, Any]) -> None:
    assert reports["who"]["returned"] == [2, 0, 0, 2]


@pytest.mark.slow
def test_an_error_wins_over_what_it_does_to_the_other_process(reports: dict[str, Any]) -> None:
    error = reports["waiting"]
    assert (error["type"], error["text"]) == ("ConfigError", "only rank 1 fails")
    assert error["notes"] == ["Failed on rank 1, outside of training."]


@pytest.mark.slow
def test_a_rank_that_was_told_of_an_error_does_not_hide_whose_it_was(
    reports: dict[str, Any],
) -> None:
    error = reports["together"]
    assert (error["type"], error["text"]) == ("KeyError", "'of rank 1'")
    assert "in together" in error["cause"]
    assert "KeyError: 'of rank 1'" in error["cause"]


@pytest.mark.slow
def test_d08_a_nan_on_one_rank_stops_both_before_the_update(reports: dict[str, Any]) -> None:
    for rank in range(2):
        report = reports[f"nan-{rank}"]
        assert report["error"].startswith("Iteration 3 on rank 1 is not finite: ")
        assert report["iter"] == 3
        assert report["weights"] == report["weights before"]
    assert reports["nan-0"]["weights"] == reports["nan-1"]["weights"]


@pytest.mark.slow
def test_a_collective_hook_missing_on_one_rank_is_an_error_on_both(reports: dict[str, Any]) -> None:
    assert [reports[f"missing_hook-{rank}"] for rank in range(2)] == [
        "Hooks that communicate must be registered on every rank, but rank 0 has ['EvalHook'] and "
        "rank 1 has []. Register them without asking for the rank; only rank 0 writes files.",
        "Hooks that communicate must be registered on every rank, but rank 1 has [] and "
        "rank 0 has ['EvalHook']. Register them without asking for the rank; only rank 0 writes "
        "files.",
    ]


@pytest.mark.slow
def test_metrics_are_means_over_the_ranks_and_data_time_the_largest(
    reports: dict[str, Any],
) -> None:
    for rank in range(2):
        report = reports[f"metrics-{rank}"]
        assert report["rank"] == [[0.5, i] for i in range(5)]
        assert report["only 1"] == [[7.0, i] for i in range(5)]
    assert reports["metrics-0"]["data_time"] == reports["metrics-1"]["data_time"]
    assert reports["metrics-0"]["loss"] == reports["metrics-1"]["loss"]


@pytest.mark.slow
def test_d06_ranks_exchange_metrics_only_when_due_and_unpickled(reports: dict[str, Any]) -> None:
    for rank in range(2):
        collectives = reports[f"metrics-{rank}"]["collectives"]
        # Every 4 iterations, and at the end.
        assert {name for name, _ in collectives} == {"all_gather"}
        assert {iteration for _, iteration in collectives} == {3, 4}


@pytest.mark.slow
def test_ranks_stop_together_at_the_next_agreement(reports: dict[str, Any]) -> None:
    for rank in range(2):
        # Rank 1 asked in iteration 1; metrics come together every 4 iterations.
        assert reports[f"stop-{rank}"] == {"iter": 4, "max_iter": 4, "interruption": None}


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path) -> None:
    done = run_script(tmp_path, "ctrl_c")
    assert done.returncode == 130, done.stderr
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000003.pth"]


@pytest.fixture(scope="module")
def torchruns_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("torchrun")
    done = run_script(folder, "metrics", "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_d43_torchrun_is_recognised(torchruns_reports: dict[str, Any]) -> None:
    assert torchruns_reports["metrics-0"]["rank"] == torchruns_reports["metrics-1"]["rank"]
    assert torchruns_reports["metrics-0"]["rank"][0] == [0.5, 0]


@pytest.mark.slow
def test_d43_processes_of_torchrun_may_form_a_second_group(
    torchruns_reports: dict[str, Any],
) -> None:
    assert [torchruns_reports[f"who-{rank}"] for rank in range(2)] == [[2, 0, 0, 2], [2, 1, 1, 2]]


@pytest.mark.slow
def test_d43_two_tasks_of_srun_know_each_other(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**script_env(), **SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    env |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
    command = [sys.executable, __file__, str(tmp_path), "task_of_srun"]
    tasks = [
        subprocess.Popen(command, env={**env, "SLURM_PROCID": n, "SLURM_LOCALID": n}) for n in "01"
    ]
    assert [task.wait(60) for task in tasks] == [0, 0]
    found = [json.loads((tmp_path / f"who-{rank}.json").read_text()) for rank in range(2)]
    assert found == [[2, 0, 0, 2], [2, 1, 1, 2]]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no names of threads")
def test_no_thread_of_gloo_is_left_to_abort_a_process_of_torchrun_as_it_ends(
    torchruns_reports: dict[str, Any],
) -> None:
    for rank in range(2):
        threads = torchruns_reports[f"threads-{rank}"]
        assert threads
        assert [name for name in threads if "gloo" in name] == []


@pytest.mark.slow
def test_torchrun_names_the_first_failure_with_its_traceback(tmp_path: Path) -> None:
    done = run_script(tmp_path, "waiting", "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert done.returncode == 1
    _, others, first = re.split("Failures:|Root Cause", done.stderr)
    assert "rank      : 0" in others
    assert "rank      : 1" in first
    assert "in waiting" in first
    assert "ConfigError: only rank 1 fails" in first


@pytest.mark.slow
def test_torchrun_sees_the_exit_code_of_a_run_that_a_signal_ended(tmp_path: Path) -> None:
    done = run_script(
        tmp_path, "signal_to_one", "-m", "torch.distributed.run", "--nproc-per-node", "2"
    )
    assert re.search(r"exitcode  : 143 ", done.stderr), done.stderr
    assert "model_0000007.pth" in {path.name for path in tmp_path.glob("*.pth")}


# From here on: what the processes run.


def report(folder: str, name: str, content: Any) -> None:
    Path(folder, f"{name}.json").write_text(json.dumps(content), "utf-8")


def who(folder: str) -> list[int]:
    numbers = [comm.get_world_size(), comm.get_rank(), comm.get_local_rank(), comm.get_local_size()]
    report(folder, f"who-{comm.get_rank()}", numbers)
    return numbers


def waiting(folder: str) -> None:
    if comm.get_rank() == 1:
        atexit.register(time.sleep, 1.0)  # So that the other one is the first to be gone.
        raise ConfigError("only rank 1 fails")
    comm.synchronize()


def together(folder: str) -> None:
    def fail() -> None:
        if comm.get_rank() == 1:
            raise KeyError("of rank 1")

    comm.together(fail)


def signal_to_one(folder: str) -> None:
    train(Path(folder), Fault("forward", 5, signal.SIGTERM))


class Net(nn.Module):
    """Gives its rank as a metric, another metric on rank 1 only, and there a NaN in one step."""

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        self.nan_at = nan_at

    def forward(self, batch: torch.Tensor) -> dict[str, Any]:
        rank = comm.get_rank()
        loss = self.linear(batch).square().mean()
        self.nan_at -= 1
        if self.nan_at == -1 and rank == 1:
            loss = loss * math.nan
        metrics = {"rank": float(rank)} | ({"only 1": 7.0} if rank == 1 else {})
        return {"loss": loss, **metrics}


def ddp_trainer(nan_at: int = -1) -> SimpleTrainer:
    generator = torch.Generator().manual_seed(comm.get_rank())
    model = create_ddp_model(Net(nan_at))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randn(3, 2, generator=generator) for _ in range(3)]
    return SimpleTrainer(model, batches, optimizer, gather_metric_period=4)


def weights(trainer: SimpleTrainer) -> list[float]:
    return [float(w) for p in trainer.model.parameters() for w in p.detach().flatten()]


def nan(folder: str) -> None:
    logging.disable()
    trainer = ddp_trainer(nan_at=3)
    result: dict[str, Any] = {}

    def keep(trainer: SimpleTrainer) -> None:
        result["weights before"] = weights(trainer)

    trainer.register_hooks([CallbackHook(before_step=keep)])
    try:
        trainer.train(0, 10)
    except FloatingPointError as e:
        result |= {"error": str(e), "iter": trainer.iter, "weights": weights(trainer)}
    report(folder, f"nan-{comm.get_rank()}", result)


def missing_hook(folder: str) -> None:
    logging.disable()
    trainer = ddp_trainer()
    trainer.register_hooks([EvalHook(1, dict) if comm.get_rank() == 0 else None])
    try:
        trainer.train(0, 1)
    except ConfigError as e:
        report(folder, f"missing_hook-{comm.get_rank()}", str(e))


def metrics(folder: str) -> None:
    trainer = ddp_trainer()
    trainer.cycle = lambda: trainer  # type: ignore[attr-defined]  # as users' code has them
    noting = NotingCollectives()
    trainer.register_hooks([noting])
    trainer.train(0, 5)
    names = ("rank", "only 1", "data_time", "loss")
    content = {name: trainer.storage.history(name).values() for name in names}
    report(folder, f"metrics-{comm.get_rank()}", {**content, "collectives": noting.noted})


COLLECTIVES = (
    *("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast"),
    *("broadcast_object_list", "gather", "gather_object", "reduce"),
)


class NotingCollectives(HookBase):
    """Notes which functions of torch.distributed are called in which iteration's step."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, int]] = []
        self._originals: dict[str, Any] = {}

    def before_step(self) -> None:
        for name in () if self._originals else COLLECTIVES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, partial(self._note, name))

    def after_train(self) -> None:
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _note(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.noted.append((name, self.trainer.iter))
        return self._originals[name](*args, **kwargs)


def stop(folder: str) -> None:
    trainer = ddp_trainer()

    def ask(trainer: SimpleTrainer) -> None:
        if trainer.iter == 1 and comm.get_rank() == 1:
            trainer.request_stop("enough", finished=True)

    trainer.register_hooks([CallbackHook(after_step=ask)])
    trainer.train(0, 10)
    names = ("iter", "max_iter", "interruption")
    report(folder, f"stop-{comm.get_rank()}", {name: getattr(trainer, name) for name in names})


def ctrl_c(folder: str) -> None:
    trainer = ddp_trainer()

    def press(trainer: SimpleTrainer) -> None:
        comm.synchronize()
        if trainer.iter == 1 and comm.get_rank() == 0:
            os.killpg(os.getpgrp(), signal.SIGINT)

    trainer.register_hooks(
        [
            CallbackHook(before_step=press),
            PeriodicCheckpointer(Checkpointer(trainer.model, folder, trainer=trainer), 0),
        ]
    )
    trainer.train(0, 1000)


RAISING: list[Callable[[str], None]] = [waiting, together]
TRAINING: list[Callable[[str], None]] = [nan, missing_hook, metrics, stop]


def main(folder: str, case: str) -> None:
    if case == "task_of_srun":
        launch(who, args=(folder,))
        return
    if case != "all":
        with exit_codes():
            launch(globals()[case], 2, args=(folder,))
            if case == "metrics":
                launch(who, 2, args=(folder,))
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        report(folder, f"threads-{os.environ['RANK']}", threads)
        return
    returned = launch(who, 2, args=(folder,))
    report(folder, "who", {"returned": returned, "initialized": dist.is_initialized()})
    for function in RAISING:
        try:
            launch(function, 2, args=(folder,))
        except Exception as e:
            error = {"type": type(e).__name__, "text": str(e), "cause": str(e.__cause__)}
            report(folder, function.__name__, {**error, "notes": e.__notes__})
    for function in TRAINING:
        launch(function, 2, args=(folder,))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
