"""`MLflowWriter`: metrics and images as a run of MLflow."""

import os
import re
import time
from typing import Any

import numpy as np

from trainkit.utils.events.writer import RunWriter

_TAG = "trainkit.run_id"


class MLflowWriter(RunWriter):
    """Writes a run of MLflow; the iteration is its step.

    A resumed run goes on with the run that has its id in the tag `trainkit.run_id`, and leaves out
    what is there. Images become artifacts `images/<name>/<iteration>.png`. Characters that MLflow
    refuses in names become underscores.

    Args:
        experiment: Its name; by default the environment's MLFLOW_EXPERIMENT_NAME, or "Default".
        tracking_uri: Address of the server or store; by default MLflow's own setting.
        run_name: Name of the run; by default MLflow makes one up.
        window_size: Iterations that the median of a smoothed scalar covers.
    """

    def __init__(
        self,
        experiment: str | None = None,
        tracking_uri: str | None = None,
        run_name: str | None = None,
        window_size: int = 20,
    ) -> None:
        super().__init__("mlflow", "MlflowException", window_size)
        self._client = self._library.MlflowClient(tracking_uri)
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        self._run_name = run_name

    def _open(self, run_id: str) -> str:
        client = self._client
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        runs = client.search_runs([experiment], f"tags.`{_TAG}` = '{run_id}'", max_results=1)
        tags = {_TAG: run_id}
        run = runs[0] if runs else client.create_run(experiment, None, tags, self._run_name)
        own_id: str = run.info.run_id
        client.update_run(own_id, status="RUNNING")
        self._last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        return own_id

    def _log(self, iteration: int, record: dict[str, Any]) -> None:
        now, metrics = time.time_ns() // 10**6, []
        for name, value in record.items():
            key = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
            if isinstance(value, np.ndarray):
                self._client.log_image(self._run, value, f"images/{key}/{iteration:07d}.png")
            elif iteration > self._last_steps.get(key, -1):
                metrics.append(self._library.entities.Metric(key, value, now, iteration))
        self._client.log_batch(self._run, metrics)
        self._last_steps.update((metric.key, iteration) for metric in metrics)

    def _finish(self, run: str) -> None:
        self._client.set_terminated(run)
