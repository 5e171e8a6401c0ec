"""The SOLVER keys that the builders read, with the values that the tests start from."""

import pytest
from fvcore.common.config import CfgNode


@pytest.fixture
def cfg() -> CfgNode:
    clip = {"ENABLED": False, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0}
    return CfgNode(
        {
            "SOLVER": {
                "OPTIMIZER": "SGD",
                "BASE_LR": 0.1,
                "BASE_LR_END": 0.0,
                "MOMENTUM": 0.9,
                "NESTEROV": False,
                "BETAS": (0.9, 0.999),
                "WEIGHT_DECAY": 0.01,
                "WEIGHT_DECAY_NORM": 0.0,
                "WEIGHT_DECAY_BIAS": None,
                "BIAS_LR_FACTOR": 1.0,
                "MAX_ITER": 100,
                "LR_SCHEDULER_NAME": "WarmupCosineLR",
                "GAMMA": 0.1,
                "STEPS": (50, 80),
                "NUM_DECAYS": 3,
                "WARMUP_FACTOR": 0.01,
                "WARMUP_ITERS": 10,
                "WARMUP_METHOD": "linear",
                "RESCALE_INTERVAL": False,
                "IMS_PER_BATCH": 32,
                "CLIP_GRADIENTS": clip,
            }
        }
    )
