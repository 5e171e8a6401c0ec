"""The MODEL keys that the builders read, with the values that the tests start from."""

import pytest
from fvcore.common.config import CfgNode


@pytest.fixture
def cfg() -> CfgNode:
    return CfgNode(
        {
            "MODEL": {
                "META_ARCHITECTURE": "ImageClassifier",
                "DEVICE": "cpu",
                "CHANNELS_LAST": False,
                "WEIGHTS": "",
                "PIXEL_MEAN": [72.94],
                "PIXEL_STD": [90.02],
                "NUM_CLASSES": 10,
                "DROPOUT": 0.0,
                "LABEL_SMOOTHING": 0.0,
                "BACKBONE": {"NAME": "SmallResNet", "WIDTHS": (4, 8), "BLOCKS": (1, 1)},
            }
        }
    )
