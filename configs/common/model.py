"""A small residual net (304,000 parameters) for grey images of 28 x 28 pixels."""

from trainkit.config import LazyCall as L
from trainkit.modeling import ImageClassifier, SmallResNet

model = L(ImageClassifier)(
    backbone=L(SmallResNet)(in_channels=1, widths=[16, 32, 64, 128], blocks=[0, 1, 1, 1]),
    num_classes=10,
    # Of Fashion-MNIST.
    pixel_mean=[72.94],
    pixel_std=[90.02],
)
