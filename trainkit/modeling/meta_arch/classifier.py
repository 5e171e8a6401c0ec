"""Image classification: one label for each image."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  # As torch's own documentation calls it.
from fvcore.common.config import CfgNode
from torch import nn

from trainkit.modeling.build import META_ARCH_REGISTRY, build_backbone
from trainkit.utils.errors import ConfigError


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Backbone, global average pooling, dropout, and one linear layer.

    Args:
        backbone: Maps (N, channels, H, W) to (N, out_channels, h, w); has `out_channels`, an int.
        num_classes: Labels are in [0, num_classes).
        pixel_mean: For each channel, in the unit of the images' pixels (0 to 255 for bytes).
        pixel_std: As `pixel_mean`, above 0.
        dropout: Probability that a pooled feature is dropped in training, in [0, 1).
        label_smoothing: Part of the target that all classes share, in [0, 1]; Szegedy et al.
            (arXiv:1512.00567), sec. 7.

    Raises:
        ConfigError: If `pixel_mean` and `pixel_std` differ in length, or a std is not above 0.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        positive = all(std > 0 for std in pixel_std)
        if not 0 < len(pixel_std) == len(pixel_mean) or not positive:
            raise ConfigError(
                f"MODEL.PIXEL_MEAN is {list(pixel_mean)} and MODEL.PIXEL_STD is {list(pixel_std)}, "
                "but both need one number for each channel, and the latter above 0."
            )
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(cast(int, backbone.out_channels), num_classes)
        self.label_smoothing = label_smoothing
        # Settings, not state: they come from the config, also when weights come from elsewhere.
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "ImageClassifier":
        """Builds the classifier that `MODEL` describes, with its backbone."""
        return cls(
            build_backbone(cfg),
            cfg.MODEL.NUM_CLASSES,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            dropout=cfg.MODEL.DROPOUT,
            label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        )

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Computes the loss in training, the logits in evaluation.

        Args:
            batch: "image", uint8 or float (N, channels, H, W), not normalized; in training "label"
                too, int64 (N,).

        Returns:
            In training {"loss_cls": scalar}, the mean over the batch; in evaluation {"logits":
            float32 (N, num_classes)}.

        Raises:
            ConfigError: If "label" is missing in training, or, found on the CPU only, has values
                outside [0, num_classes).
        """
        image = (batch["image"] - self.pixel_mean) / self.pixel_std
        features = self.backbone(image).mean(dim=(2, 3))
        logits: torch.Tensor = self.head(self.dropout(features))
        if not self.training:
            return {"logits": logits.float()}
        if "label" not in batch:
            raise ConfigError(
                f"ImageClassifier needs batch['label'] in training, but the batch has only "
                f"{sorted(batch)}. Let the data set give labels, or call model.eval() to predict."
            )
        return {"loss_cls": self._cross_entropy(logits, batch["label"])}

    def _cross_entropy(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        try:
            return F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        # Looking for such labels in each batch would make a GPU wait; there, its kernel fails.
        except IndexError:
            raise ConfigError(
                f"MODEL.NUM_CLASSES is {logits.shape[1]}, so labels are in [0, {logits.shape[1]}), "
                f"but those of this batch reach from {int(label.min())} to {int(label.max())}. Set "
                "MODEL.NUM_CLASSES to the data set's number of classes, or mend its labels."
            ) from None
