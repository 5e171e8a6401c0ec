"""Two processes save, fail, skip and resume as one."""

import json
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointError

pytestmark = pytest.mark.slow


class Collective:
    """A state that takes all ranks to tell, and that one rank may fail to tell."""

    def __init__(self, failing_rank: int | None = None) -> None:
        self.failing_rank = failing_rank
        self.ranks: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        ranks = comm.all_gather(comm.get_rank())
        if comm.get_rank() == self.failing_rank:
            raise CheckpointError("out of state")
        return {"ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ranks = state["ranks"]


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except CheckpointError as e:
        return str(e)
    return ""


def save_in_background(checkpointer: Checkpointer) -> list[Any]:
    """Saves once, then where no folder can be made; returns what each rank then learns."""
    background, told = checkpointer.background, []

    def save() -> None:
        checkpointer.save_in_background("ema_0000005", lambda: None, nullcontext, iteration=5)

    save()
    # Only rank 0 knows whether it is over; what follows waits on both.
    told.append(error_of(checkpointer.save_untagged, "ema_best"))
    folder, checkpointer.save_dir = checkpointer.save_dir, "/dev/null/nowhere"
    save()
    background._is_over.wait()
    told.append(error_of(background.poll))
    told.append(error_of(background.wait))
    save()
    checkpointer.save_dir = folder
    # After an error of its own, no rank waits for the others.
    told.append(error_of(background.wait, alone=True))
    return told


def work(folder: Path) -> dict[str, Any]:
    state = Collective()
    # As detectron2's users write it: the others take part all the same.
    checkpointer = Checkpointer(
        nn.Linear(1, 1), folder / "run", save_to_disk=comm.is_main_process(), state=state
    )
    for i in range(2):
        checkpointer.save(f"model_{i:07d}", iteration=i)
    checkpointer.keep_newest("model", 2)
    state.failing_rank = 1
    report: dict[str, Any] = {"failed save": error_of(checkpointer.save, "model_0000002")}
    state.failing_rank = None
    report["newest"] = checkpointer.get_checkpoint_file()
    comm.synchronize()
    if comm.is_main_process():
        path = folder / "run" / "model_0000001.pth"
        path.write_bytes(path.read_bytes()[:-1])
    comm.synchronize()
    report["extra"] = checkpointer.resume_or_load("")
    report["ranks"] = state.ranks
    report["background"] = save_in_background(checkpointer)
    checkpointer.mark_finished(1)
    report["finished"] = checkpointer.finished_iteration()
    checkpointer.clear_finished()
    # Under one path each rank has a disk of its own, where rank 1 finds nothing.
    (folder / str(comm.get_rank())).mkdir()
    os.chdir(folder / str(comm.get_rank()))
    own = Checkpointer(nn.Linear(1, 1), "own", state=state)
    own.save("model_0000004", iteration=4)
    state.ranks = []
    report["own disk"] = [own.has_checkpoint(), own.resume_or_load(""), state.ranks]
    # A file that one rank cannot read, though it is there, is of no use to any.
    checkpointer.save("model_0000003", iteration=3)
    if not comm.is_main_process():
        torch.load = None  # type: ignore[assignment]  # this process ends here
    report["unreadable"] = error_of(checkpointer.resume_or_load, "")
    return report


def run(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(work(folder)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    spawn(run, (folder, port), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_d27_a_state_that_one_rank_cannot_tell_is_saved_by_none(
    folder: Path, reports: list[dict[str, Any]]
) -> None:
    assert reports[0]["failed save"] == "rank 1 failed: out of state"
    assert reports[1]["failed save"] == "out of state"
    assert not (folder / "run" / "model_0000002.pth").exists()


def test_d23_d27_all_ranks_tell_their_state_and_resume_from_the_same_file(
    folder: Path, reports: list[dict[str, Any]]
) -> None:
    for report in reports:
        assert report["newest"] == str(folder / "run" / "model_0000001.pth")
        assert report["extra"] == {"iteration": 0}
        assert report["ranks"] == [0, 1]
        assert report["finished"] == 1


def test_d23_a_file_that_only_rank_0_sees_reaches_all(
    folder: Path, reports: list[dict[str, Any]]
) -> None:
    assert (folder / "0" / "own" / "model_0000004.pth").is_file()
    assert os.listdir(folder / "1") == []
    assert [report["own disk"] for report in reports] == [[True, {"iteration": 4}, [0, 1]]] * 2


def test_f20_all_ranks_learn_what_became_of_a_save_in_the_background(
    folder: Path, reports: list[dict[str, Any]]
) -> None:
    assert (folder / "run" / "ema_0000005.pth").is_file()
    error = (
        "Cannot save checkpoint /dev/null/nowhere/ema_0000005.pth: Not a directory. Earlier "
        "checkpoints are intact: check the storage, or set another OUTPUT_DIR."
    )
    assert reports[0]["background"] == ["", error, "", error]
    assert reports[1]["background"] == ["", error, "", ""]


def test_a_file_that_one_rank_cannot_load_is_skipped_by_all(reports: list[dict[str, Any]]) -> None:
    assert all("No checkpoint in" in report["unreadable"] for report in reports)
    assert "rank 1 failed" in reports[0]["unreadable"]
