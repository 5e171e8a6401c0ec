"""Random changes of single images, each drawing from torch's global generator.

Images are tensors of shape (C, H, W) and any dtype. No transform changes its input in place.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # The name that every PyTorch program gives it.

from trainkit.utils.errors import ConfigError

Transform = Callable[[torch.Tensor], torch.Tensor]


class RandomCrop:
    """Crops the image, padded with zeros on all sides, back to its size at a random place.

    Args:
        padding: Pixels added on each side, at least 0; the image moves by at most as many, which
            may be out of sight.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Returns a changed image of the same shape and dtype."""
        places = 2 * self.padding + 1
        x, y = (int(u * places) - self.padding for u in torch.rand(2).tolist())
        height, width = image.shape[-2:]
        # Moved by its whole size or more, the image is out of sight.
        x, y = max(-width, min(x, width)), max(-height, min(y, height))
        # A negative padding crops: the image moves by (x, y), and zeros follow it.
        return F.pad(image, (x, -x, y, -y))


class RandomHorizontalFlip:
    """Mirrors the image left to right.

    Args:
        prob: How often, in [0, 1].
    """

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Returns the image or its mirror image."""
        return image.flip(-1) if torch.rand(()).item() < self.prob else image


class RandomErasing:
    """Overwrites a random rectangle with one value.

    After Zhong et al., "Random Erasing Data Augmentation" (arXiv:1708.04896), algorithm 1, except
    that a rectangle longer than the image is cut to it instead of drawn again.

    Args:
        prob: How often, in [0, 1].
        area: Least and largest area of the rectangle, as a part of the image's, in [0, 1].
        ratio: Least and largest height divided by width; the least as often as the largest.
        value: What the rectangle is filled with.
    """

    def __init__(
        self,
        prob: float,
        area: tuple[float, float] = (0.02, 0.4),
        ratio: tuple[float, float] = (0.3, 1 / 0.3),
        value: float = 0,
    ) -> None:
        self.prob = prob
        self.area = area
        self.ratio = ratio
        self.value = value

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Returns the image, or a copy of it that is erased in part."""
        chance, area, ratio, top, left = torch.rand(5).tolist()
        if chance >= self.prob:
            return image
        height, width = image.shape[-2:]
        pixels = height * width * (self.area[0] + area * (self.area[1] - self.area[0]))
        h_by_w = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** ratio
        h = min(height, round(math.sqrt(pixels * h_by_w)))
        w = min(width, round(math.sqrt(pixels / h_by_w)))
        y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
        image = image.clone()
        image[..., y : y + h, x : x + w] = self.value
        return image


class Compose:
    """Transforms applied one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Returns the image that comes out of the last transform."""
        for transform in self.transforms:
            image = transform(image)
        return image


class ImageMapper:
    """Applies a transform to the "image" of a sample and leaves the rest of it alone.

    Args:
        transform: From an image to an image, such as a `Compose`.

    Raises:
        ConfigError: When called with a sample that is not a dict with an "image".
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, sample: Any) -> dict[str, Any]:
        """Returns a copy of the sample with its image changed."""
        if not isinstance(sample, dict) or "image" not in sample:
            keys = f" of {list(sample)}" if isinstance(sample, dict) else ""
            raise ConfigError(
                "Image transforms need samples that are dicts with an 'image', not a "
                f"{type(sample).__name__}{keys}. Set CROP_PADDING, FLIP_PROB and ERASE_PROB in "
                "INPUT to 0, or pass a mapper of your own."
            )
        return {**sample, "image": self.transform(sample["image"])}
