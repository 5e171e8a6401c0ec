"""`DefaultPredictor`: a trained model's answer to one sample."""

import copy
import logging
from typing import Any

import torch
from torch.utils.data import default_collate

from trainkit.checkpoint.checkpointer import Checkpointer
from trainkit.config.config import CfgNode
from trainkit.config.lazy_cfg import build_part
from trainkit.engine.hooks.ema import averaged_weights
from trainkit.engine.run_config import precision_of
from trainkit.modeling.build import build_model
from trainkit.utils.device import autocast, resolve_device
from trainkit.utils.nested import move_to


class DefaultPredictor:
    """Builds the model of a config with `MODEL.WEIGHTS`, and runs it on one sample at a time.

    For many samples, `inference_on_dataset` and a loader are faster.

    Args:
        cfg: The whole config, of any task; `load_cfg` makes one of a .py file too.

    Raises:
        CheckpointError: If `MODEL.WEIGHTS` is missing, damaged, or of another model.

    Example:
        >>> from trainkit.config import get_cfg
        >>> predictor = DefaultPredictor(get_cfg())
        >>> predictor({"image": torch.zeros(1, 28, 28, dtype=torch.uint8)})["logits"].shape
        torch.Size([1, 10])
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg.clone()
        self._device = resolve_device(cfg.MODEL.DEVICE)
        model = build_part(cfg, "model", lambda: build_model(cfg)).to(self._device).eval()
        if not cfg.MODEL.WEIGHTS:
            text = "MODEL.WEIGHTS is empty: the model answers at random until weights are loaded."
            logging.getLogger(__name__).warning(text)
        checkpointer = Checkpointer(model, trust_pickle=cfg.MODEL.TRUST_PICKLE)
        checkpoint = checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        with averaged_weights(model, checkpoint if cfg.MODEL.EMA.ENABLED else {}):
            self.model = copy.deepcopy(model)

    def __call__(self, sample: Any) -> Any:
        """Returns what the model returns for a batch of this one sample, on the model's device.

        Args:
            sample: As the data set of a test loader gives it, such as {"image": uint8 (C, H, W)};
                `default_collate` gives its arrays and tensors a first dimension of 1.
        """
        batch = move_to(default_collate([sample]), self._device)
        with torch.no_grad(), autocast(precision_of(self.cfg), self._device):
            return self.model(batch)
