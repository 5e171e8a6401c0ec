"""Data: what is registered, in which order it is seen, and how it becomes batches."""

from trainkit.data.benchmark import DataLoaderBenchmark
from trainkit.data.build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    build_test_loader,
    build_train_loader,
    build_train_mapper,
)
from trainkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from trainkit.data.common import (
    AspectRatioGroupedDataset,
    DatasetFromList,
    MapDataset,
    SeededBatches,
    ToIterableDataset,
    set_default_dataset_from_list_serialize_method,
)
from trainkit.data.datasets.fashion_mnist import FashionMNIST
from trainkit.data.samplers.distributed_sampler import (
    SAMPLER_REGISTRY,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from trainkit.data.samplers.grouped_batch_sampler import GroupedBatchSampler
from trainkit.data.samplers.permutation import Permutation
from trainkit.data.train_loader import TrainLoader
from trainkit.data.transforms import (
    Compose,
    ImageMapper,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
)

__all__ = [
    "SAMPLER_REGISTRY",
    "AspectRatioGroupedDataset",
    "Compose",
    "DataLoaderBenchmark",
    "DatasetCatalog",
    "DatasetFromList",
    "FashionMNIST",
    "GroupedBatchSampler",
    "ImageMapper",
    "InferenceSampler",
    "MapDataset",
    "Metadata",
    "MetadataCatalog",
    "Permutation",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "SeededBatches",
    "ToIterableDataset",
    "TrainLoader",
    "TrainingSampler",
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "build_test_loader",
    "build_train_loader",
    "build_train_mapper",
    "set_default_dataset_from_list_serialize_method",
]
