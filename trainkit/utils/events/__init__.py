"""Metrics: the storage that a run puts them in, and the writers that bring them out."""

from trainkit.utils.events.history import HistoryBuffer
from trainkit.utils.events.json_writer import JSONWriter
from trainkit.utils.events.mlflow_writer import MLflowWriter
from trainkit.utils.events.printer import CommonMetricPrinter
from trainkit.utils.events.storage import EventStorage, get_event_storage, has_event_storage
from trainkit.utils.events.tensorboard import TensorboardXWriter
from trainkit.utils.events.wandb_writer import WandbWriter
from trainkit.utils.events.writer import EventWriter

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "HistoryBuffer",
    "JSONWriter",
    "MLflowWriter",
    "TensorboardXWriter",
    "WandbWriter",
    "get_event_storage",
    "has_event_storage",
]
