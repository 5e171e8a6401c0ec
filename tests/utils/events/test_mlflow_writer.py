import importlib.util
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.utils.errors import ConfigError
from trainkit.utils.events.mlflow_writer import MLflowWriter
from trainkit.utils.events.storage import EventStorage

# MLflow uses what sqlalchemy is going to change.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Without sqlalchemy, which mlflow-skinny does not bring, there is no local store.
needs_store = pytest.mark.skipif(
    not (importlib.util.find_spec("mlflow") and importlib.util.find_spec("sqlalchemy")),
    reason="needs mlflow with a local store: pip install mlflow",
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local store, the same for all tests, since making its tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        # Read when it is imported; nothing may leave this machine.
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("DO_NOT_TRACK", "true")
        folder = tmp_path_factory.mktemp("store")
        patch.chdir(folder)
        yield f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def experiment(uri: str, request: pytest.FixtureRequest) -> str:
    name: str = request.node.name
    return name


def client(uri: str) -> Any:
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(uri)


def only_run(uri: str, experiment: str) -> Any:
    found = client(uri).get_experiment_by_name(experiment)
    (run,) = client(uri).search_runs([found.experiment_id])
    return run


def history(uri: str, experiment: str, name: str) -> list[tuple[int, float]]:
    run_id = only_run(uri, experiment).info.run_id
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, name))


def run(
    writer: MLflowWriter, storage: EventStorage, iterations: range, save_before: int | None = None
) -> dict[str, Any]:
    """Trains, with a write every 10; returns a checkpoint from inside step `save_before`."""
    saved: dict[str, Any] = {}
    with storage:
        for i in iterations:
            storage.iter = i
            storage.put_scalar("lr", i + 0.5, smoothing_hint=False)
            if i == save_before:
                file = io.BytesIO()
                torch.save({"storage": storage.state_dict(), "writer": writer.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            if i % 10 == 9:
                writer.write()
    return saved


@pytest.mark.slow
@needs_store
def test_scalars_and_images_can_be_read_back(uri: str, experiment: str, tmp_path: Path) -> None:
    writer = MLflowWriter(experiment, uri, "my run", window_size=3)
    gradient = torch.linspace(0, 1, 24).reshape(1, 4, 6)
    with EventStorage() as storage:
        for i, value in enumerate([8.0, 1.0, 5.0, 3.0]):
            storage.iter = i
            storage.put_scalar("loss", value)
        storage.put_scalar("[metric]iou/a", 0.25, smoothing_hint=False, cur_iter=1)
        storage.put_scalar("[metric]iou/a", 0.75, smoothing_hint=False, cur_iter=3)
        storage.put_scalar("nothing", math.nan)
        storage.put_image("val/color", np.full((3, 4, 6), 200, dtype=np.uint8))
        storage.put_image("grey", gradient)
        writer.write()
    assert only_run(uri, experiment).info.status == "RUNNING"
    writer.close()
    written = only_run(uri, experiment)
    assert (written.info.status, written.info.run_name) == ("FINISHED", "my run")
    assert history(uri, experiment, "loss") == [(3, 3.0)]
    assert history(uri, experiment, "_metric_iou/a") == [(1, 0.25), (3, 0.75)]
    assert math.isnan(history(uri, experiment, "nothing")[0][1])
    image = pytest.importorskip("PIL.Image")
    folder = Path(client(uri).download_artifacts(written.info.run_id, "images", str(tmp_path)))
    assert (np.asarray(image.open(folder / "val" / "color" / "0000003.png")) == 200).all()
    grey = np.asarray(image.open(folder / "grey" / "0000003.png"))
    assert (grey == (gradient[0] * 255).round().numpy()).all()


# Before the first write, between two writes, and in a step that writes.
@pytest.mark.slow
@needs_store
@pytest.mark.parametrize("save", [5, 15, 19])
def test_a_resumed_run_goes_on_and_writes_nothing_twice(
    uri: str, experiment: str, save: int
) -> None:
    killed = MLflowWriter(experiment, uri)
    saved = run(killed, EventStorage(), range(30), save_before=save)
    writer, storage = MLflowWriter(experiment, uri), EventStorage(save + 1)
    writer.load_state_dict(saved["writer"])
    storage.load_state_dict(saved["storage"])
    if save % 10 == 9:
        with storage:
            writer.write()
    run(writer, storage, range(save + 1, 45))
    assert history(uri, experiment, "lr") == [(i, i + 0.5) for i in (9, 19, 29, 39)]
    writer.close()
    # Goes on after it was closed.
    run(writer, storage, range(45, 50))
    assert history(uri, experiment, "lr")[-1] == (49, 49.5)
    assert only_run(uri, experiment).info.status == "RUNNING"


@pytest.mark.slow
@needs_store
def test_an_image_that_is_written_again_replaces_itself(uri: str, experiment: str) -> None:
    writer = MLflowWriter(experiment, uri)
    with EventStorage() as storage:
        storage.put_image("i", np.zeros((1, 4, 6), dtype=np.uint8))
        writer.write()
        writer.write()
    run_id = only_run(uri, experiment).info.run_id
    listed = client(uri).list_artifacts(run_id, "images/i")
    assert [artifact.path for artifact in listed] == ["images/i/0000000.png"]


@pytest.mark.slow
@needs_store
def test_a_run_that_starts_anew_is_another_one(uri: str, experiment: str) -> None:
    writer = MLflowWriter(experiment, uri)
    run(writer, EventStorage(), range(10))
    writer.reset()
    run(writer, EventStorage(), range(20))
    found = client(uri).get_experiment_by_name(experiment)
    runs = client(uri).search_runs([found.experiment_id])
    assert sorted(r.data.metrics["lr"] for r in runs) == [9.5, 19.5]
    assert sorted(r.info.status for r in runs) == ["FINISHED", "RUNNING"]


@pytest.mark.slow
@needs_store
def test_what_the_store_refused_is_written_next_time(
    uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, storage = MLflowWriter(experiment, uri), EventStorage()
    mlflow = pytest.importorskip("mlflow")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise mlflow.MlflowException("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", refuse)
        with pytest.raises(OSError, match="MLflowWriter cannot write: the server is away"):
            run(writer, storage, range(10))
    with storage:
        writer.write()
    assert history(uri, experiment, "lr") == [(9, 9.5)]


def test_missing_mlflow_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"needs mlflow: pip install 'trainkit\[mlflow\]'"):
        MLflowWriter()
