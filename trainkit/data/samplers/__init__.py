"""Which samples are seen, and in which order."""

from trainkit.data.samplers.distributed_sampler import (
    SAMPLER_REGISTRY,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from trainkit.data.samplers.grouped_batch_sampler import GroupedBatchSampler
from trainkit.data.samplers.order import (
    EndlessOrder,
    EpochOrder,
    EpochSampler,
    Position,
    SampleKey,
)
from trainkit.data.samplers.permutation import Permutation

__all__ = [
    "SAMPLER_REGISTRY",
    "EndlessOrder",
    "EpochOrder",
    "EpochSampler",
    "GroupedBatchSampler",
    "InferenceSampler",
    "Permutation",
    "Position",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "SampleKey",
    "TrainingSampler",
]
