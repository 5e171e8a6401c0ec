"""Data: what is registered, in which order it is seen, and how it becomes batches."""

from trainkit.data.build import (
    TrainLoader,
    build_test_loader,
    build_train_loader,
    build_train_mapper,
)
from trainkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from trainkit.data.common import MapDataset, SeededBatches
from trainkit.data.datasets.fashion_mnist import FashionMNIST
from trainkit.data.samplers.distributed_sampler import (
    SAMPLER_REGISTRY,
    InferenceSampler,
    TrainingSampler,
)
from trainkit.data.samplers.permutation import Permutation
from trainkit.data.transforms import (
    Compose,
    ImageMapper,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
)

__all__ = [
    "SAMPLER_REGISTRY",
    "Compose",
    "DatasetCatalog",
    "FashionMNIST",
    "ImageMapper",
    "InferenceSampler",
    "MapDataset",
    "Metadata",
    "MetadataCatalog",
    "Permutation",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "SeededBatches",
    "TrainLoader",
    "TrainingSampler",
    "build_test_loader",
    "build_train_loader",
    "build_train_mapper",
]
