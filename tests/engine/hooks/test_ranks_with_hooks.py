"""Two processes measure, validate and stop as one."""

import json
import multiprocessing
from typing import Any

import pytest

from tests.engine.hooks.ranks_with_hooks import run
from trainkit.engine import processes
from trainkit.engine.launch import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has come to."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.get_context("forkserver").set_forkserver_preload([run.__module__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setattr(processes, "START_METHOD", "forkserver")
        launch(run, 2, args=(folder,))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_statistics_are_those_of_all_ranks_on_each_rank(results: list[dict[str, Any]]) -> None:
    first, second = (result["precise_bn"] for result in results)
    assert first["variance"] == second["variance"]
    mean = [(a + b) / 2 for a, b in zip(first["own"], second["own"], strict=True)]
    assert first["variance"] == pytest.approx(mean, rel=1e-5)
    assert first["variance"] != pytest.approx(first["own"], rel=1e-3)


def test_losses_are_averaged_over_the_samples_of_all_ranks(results: list[dict[str, Any]]) -> None:
    first, second = (result["validation_loss"] for result in results)
    assert first["loss"] == second["loss"]
    mean = (10 * first["own"] + 3 * second["own"]) / 13
    assert (first["count"], second["count"]) == (10, 3)
    assert first["loss"] == pytest.approx(mean, rel=1e-5)


def test_ranks_stop_in_one_iteration_though_one_alone_has_the_metric(
    results: list[dict[str, Any]],
) -> None:
    # Asked for after iteration 4, heard with the metrics of iteration 7.
    assert [r["early_stopping"] for r in results] == [{"iter": 8, "max_iter": 8}] * 2
