"""Runs itself as a script in two processes, which report to the tests by a JSON file each."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trainkit
from trainkit.utils import comm
from trainkit.utils.errors import CheckpointError, ConfigError, UnknownNameError


def test_one_process_sees_itself() -> None:
    assert (comm.get_world_size(), comm.get_rank()) == (1, 0)
    assert (comm.get_local_size(), comm.get_local_rank()) == (1, 0)
    assert comm.is_main_process()
    comm.synchronize()
    assert comm.all_gather("x") == ["x"]
    assert comm.gather("x") == ["x"]
    loss = torch.tensor(2.0, requires_grad=True)
    reduced = comm.reduce_dict({"loss": loss})
    assert reduced == {"loss": 2.0}
    assert not reduced["loss"].requires_grad
    assert comm.broadcast("x") == "x"
    assert torch.equal(comm.all_gather_tensor(torch.ones(3)), torch.ones(1, 3))
    assert comm.on_main(lambda: 7) == 7
    comm.raise_together(None)


def test_local_rank_of_an_outer_launcher_does_not_count_without_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)


def test_one_process_raises_its_own_error() -> None:
    error = ConfigError("mine")
    with pytest.raises(ConfigError) as raised:
        comm.raise_together(error)
    assert raised.value is error


def test_shared_random_seeds_differ_and_fit_a_generator() -> None:
    first, second = comm.shared_random_seed(), comm.shared_random_seed()
    assert first != second
    assert 0 <= first < 2**63


def run_ranks(folder: Path, world_size: int) -> list[dict[str, Any]]:
    root = str(Path(trainkit.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank), str(world_size)],
            env={**env, "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert {process.returncode for process in processes} == {0}, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(world_size)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("comm"), 2)


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(tmp_path_factory.mktemp("groups"), 3)


@pytest.mark.slow
def test_d44_a_group_gathers_for_the_rank_that_is_named(three_ranks: list[dict[str, Any]]) -> None:
    # The group is of ranks 1 and 2, which are 0 and 1 in it.
    assert [rank["gather to 1"] for rank in three_ranks] == [[], ["of 1", "of 2"], []]
    assert [rank["gather to 2"] for rank in three_ranks] == [[], [], ["of 1", "of 2"]]
    error = "Rank 0 cannot receive what the ranks [1, 2] give. Name one of them."
    assert [rank["gather to 0"] for rank in three_ranks] == [None, *[["ConfigError", error]] * 2]


@pytest.mark.slow
def test_d44_all_gather_in_a_group_skips_the_others(three_ranks: list[dict[str, Any]]) -> None:
    assert [rank["all_gather"] for rank in three_ranks] == [[], ["of 1", "of 2"], ["of 1", "of 2"]]


@pytest.mark.slow
def test_d44_reduce_dict_gives_every_rank_the_same(three_ranks: list[dict[str, Any]]) -> None:
    # Rank r gave 10 r and 1.
    assert [rank["mean"] for rank in three_ranks] == [{"a": 1.0, "b": 10.0}] * 3
    assert [rank["sum"] for rank in three_ranks] == [{"a": 3.0, "b": 30.0}] * 3


@pytest.mark.slow
def test_reduce_dict_names_names_that_differ_on_every_rank(
    three_ranks: list[dict[str, Any]],
) -> None:
    text = "reduce_dict got different names on different ranks: [['a'], ['b'], ['b']]."
    for rank in three_ranks:
        assert rank["differing"][0] == "ConfigError"
        assert rank["differing"][1].startswith(text)


@pytest.mark.slow
def test_d43_each_new_world_has_local_groups_of_its_own(three_ranks: list[dict[str, Any]]) -> None:
    # LOCAL_WORLD_SIZE is 2, and 3 processes are not a multiple of that.
    text = "3 processes cannot be 2 on each machine. Start equally many on all machines."
    assert [rank["local, uneven"] for rank in three_ranks] == [["ConfigError", text]] * 3
    assert [rank["local, first"] for rank in three_ranks] == [[0], [1], [2]]
    assert [rank["local, replaced"] for rank in three_ranks] == [[0, 1, 2]] * 3
    assert [rank["local, second world"] for rank in three_ranks] == [[0, 1, 2]] * 3
    assert [rank["worlds kept"] for rank in three_ranks] == [1] * 3


@pytest.mark.slow
def test_local_group_is_made_when_it_is_first_asked_for(ranks: list[dict[str, Any]]) -> None:
    assert [rank["local group"] for rank in ranks] == [["of 0", "of 1"]] * 2


@pytest.mark.slow
def test_two_processes_know_each_other(ranks: list[dict[str, Any]]) -> None:
    assert [rank["who"] for rank in ranks] == [[2, 0, 2, 0, True], [2, 1, 2, 1, False]]


@pytest.mark.slow
def test_all_gather_gives_every_rank_the_objects_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    assert [rank["all_gather"] for rank in ranks] == [[{"rank": 0}, {"rank": 1}]] * 2


@pytest.mark.slow
def test_gather_gives_only_one_rank_the_objects(ranks: list[dict[str, Any]]) -> None:
    assert [rank["gather"] for rank in ranks] == [["of 0", "of 1"], []]
    assert [rank["gather to 1"] for rank in ranks] == [[], ["of 0", "of 1"]]


@pytest.mark.slow
def test_all_gather_tensor_stacks_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    # Each rank gave a transposed, hence not contiguous, matrix.
    assert [rank["tensor"] for rank in ranks] == [[[[0, 2], [1, 3]], [[10, 12], [11, 13]]]] * 2


@pytest.mark.slow
def test_broadcast_and_shared_seed_are_rank_0s(ranks: list[dict[str, Any]]) -> None:
    assert [rank["broadcast"] for rank in ranks] == ["of 0", "of 0"]
    assert ranks[0]["seed"] == ranks[1]["seed"]


@pytest.mark.slow
def test_on_main_runs_once_and_tells_everyone(ranks: list[dict[str, Any]]) -> None:
    assert [rank["on_main"] for rank in ranks] == ["made by 0", "made by 0"]
    assert [rank["on_main ran"] for rank in ranks] == [1, 0]


@pytest.mark.slow
def test_on_main_raises_a_users_error_as_it_was_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    expected = ["UnknownNameError", "Unknown model 'resnt'. Did you mean 'resnet'? Known: resnet."]
    assert [rank["on_main user"] for rank in ranks] == [expected, expected]


@pytest.mark.slow
def test_on_main_raises_any_other_error_with_its_text_on_every_rank(
    ranks: list[dict[str, Any]],
) -> None:
    assert ranks[0]["on_main other"] == ["OSError", "disk"]
    text = "rank 0 failed: OSError('disk')"
    assert ranks[1]["on_main other"] == ["RuntimeError", text]


@pytest.mark.slow
def test_raise_together_names_the_failing_rank_on_the_others(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["together other"] == ["RuntimeError", "rank 1 failed: OSError('disk')"]
    assert ranks[1]["together other"] == ["OSError", "disk"]


@pytest.mark.slow
def test_raise_together_keeps_the_kind_of_a_users_error(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["together config"] == ["ConfigError", "rank 1 failed: Unknown x 'y'. Known: z."]
    assert ranks[1]["together config"] == ["UnknownNameError", "Unknown x 'y'. Known: z."]
    assert ranks[0]["together checkpoint"] == ["CheckpointError", "torn"]
    assert ranks[1]["together checkpoint"] == ["CheckpointError", "rank 0 failed: torn"]


@pytest.mark.slow
def test_raise_together_lets_each_failing_rank_raise_its_own(ranks: list[dict[str, Any]]) -> None:
    assert [rank["together both"][1] for rank in ranks] == ["of 0", "of 1"]


@pytest.mark.slow
def test_raise_together_without_an_error_returns(ranks: list[dict[str, Any]]) -> None:
    assert [rank["together none"] for rank in ranks] == [None, None]


@pytest.mark.slow
def test_raised_errors_hold_no_frame_in_a_cycle(ranks: list[dict[str, Any]]) -> None:
    assert [rank["freed"] for rank in ranks] == [True, True]


def caught(function: Callable[[], Any]) -> list[str] | None:
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def fail() -> None:
    raise OSError("disk")


class Model:
    pass


def frees_its_locals(rank: int) -> bool:
    """Whether what a failing caller holds dies with its frame, without the garbage collector."""

    def run(seen: list[weakref.ref[Model]]) -> None:
        model = Model()
        seen.append(weakref.ref(model))
        if len(seen) == 1:
            comm.on_main(fail)
        comm.raise_together(OSError("disk") if rank == 1 else None)

    gc.disable()
    seen: list[weakref.ref[Model]] = []
    for _ in range(2):
        caught(lambda: run(seen))
    return all(reference() is None for reference in seen)


def report(rank: int) -> dict[str, Any]:
    ran: list[int] = []

    def make() -> str:
        ran.append(rank)
        return f"made by {rank}"

    def unknown() -> None:
        raise UnknownNameError("model", "resnt", ["resnet"])

    only_1 = (None, UnknownNameError("x", "y", ["z"]))
    return {
        "who": [
            comm.get_world_size(),
            comm.get_rank(),
            comm.get_local_size(),
            comm.get_local_rank(),
            comm.is_main_process(),
        ],
        "all_gather": comm.all_gather({"rank": rank}),
        "gather": comm.gather(f"of {rank}"),
        "gather to 1": comm.gather(f"of {rank}", dst=1),
        "tensor": comm.all_gather_tensor((torch.arange(4) + 10 * rank).reshape(2, 2).t()).tolist(),
        "broadcast": comm.broadcast(f"of {rank}"),
        "seed": comm.shared_random_seed(),
        "local group": comm.all_gather(f"of {rank}", comm.get_local_process_group()),
        "on_main": comm.on_main(make),
        "on_main ran": len(ran),
        "on_main user": caught(lambda: comm.on_main(unknown)),
        "on_main other": caught(lambda: comm.on_main(fail)),
        "together other": caught(lambda: comm.raise_together((None, OSError("disk"))[rank])),
        "together config": caught(lambda: comm.raise_together(only_1[rank])),
        "together checkpoint": caught(
            lambda: comm.raise_together((CheckpointError("torn"), None)[rank])
        ),
        "together both": caught(lambda: comm.raise_together(ValueError(f"of {rank}"))),
        "together none": caught(lambda: comm.raise_together(None)),
        "freed": frees_its_locals(rank),
    }


def report_groups(rank: int) -> dict[str, Any]:
    group = dist.new_group([1, 2])
    values = {"b": torch.tensor(10.0 * rank), "a": torch.tensor(1.0)}

    def gather(dst: int) -> Any:
        return comm.gather(f"of {rank}", dst, group)

    def local_ranks(number: int) -> list[int]:
        comm.create_local_process_group(number)
        return dist.get_process_group_ranks(comm.get_local_process_group())

    return {
        "gather to 0": caught(lambda: gather(0)),
        "gather to 1": gather(1),
        "gather to 2": gather(2),
        "all_gather": comm.all_gather(f"of {rank}", group),
        "mean": {name: value.item() for name, value in comm.reduce_dict(values).items()},
        "sum": {name: v.item() for name, v in comm.reduce_dict(values, average=False).items()},
        "differing": caught(lambda: comm.reduce_dict({"b" if rank else "a": torch.ones(1)})),
        "local, uneven": caught(comm.get_local_process_group),
        "local, first": local_ranks(1),
        "local, replaced": local_ranks(3),
    }


def main(folder: Path, rank: int, world_size: int) -> None:
    def join(store: str) -> None:
        path = f"file://{folder}/{store}"
        dist.init_process_group("gloo", init_method=path, rank=rank, world_size=world_size)

    join("store")
    facts = report(rank) if world_size == 2 else report_groups(rank)
    comm.synchronize()
    dist.destroy_process_group()
    if world_size == 3:
        join("second")
        comm.create_local_process_group(3)
        group = comm.get_local_process_group()
        facts["local, second world"] = dist.get_process_group_ranks(group)
        facts["worlds kept"] = len(comm._local_groups)
        del group
        comm.synchronize()
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(facts), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))


def test_together_returns_the_own_result_and_raises_the_own_error() -> None:
    assert comm.together(lambda: 3) == 3

    def fail() -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        comm.together(fail)
