import math

import pytest
import torch
from torch import nn

from trainkit.modeling.backbone.resnet import SmallResNet
from trainkit.modeling.meta_arch.classifier import ImageClassifier
from trainkit.utils.errors import ConfigError


class Identity(nn.Module):
    """Hands the normalized image on as features."""

    out_channels = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def make_classifier(dropout: float = 0.0, label_smoothing: float = 0.0) -> ImageClassifier:
    """Logits are the mean normalized pixel of each of the two channels."""
    model = ImageClassifier(
        Identity(),
        num_classes=2,
        pixel_mean=[100.0, 50.0],
        pixel_std=[50.0, 10.0],
        dropout=dropout,
        label_smoothing=label_smoothing,
    )
    nn.init.eye_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def test_images_are_normalized_by_channel_and_pooled() -> None:
    image = torch.tensor([[[[100, 200]], [[50, 70]]]], dtype=torch.uint8)
    for batch in ({"image": image}, {"image": image.float()}):
        logits = make_classifier().eval()(batch)["logits"]
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, torch.tensor([[1.0, 1.0]]))


def test_training_gives_the_cross_entropy() -> None:
    image = torch.tensor([[[[150.0]], [[50.0]]]])  # Logits 1 and 0.
    batch = {"image": image, "label": torch.tensor([1])}
    loss = make_classifier()(batch)
    assert list(loss) == ["loss_cls"]
    first, second = (-math.log(math.exp(x) / (math.e + 1)) for x in (1, 0))
    assert loss["loss_cls"].item() == pytest.approx(second)
    smoothed = make_classifier(label_smoothing=0.2)(batch)["loss_cls"].item()
    assert smoothed == pytest.approx(0.9 * second + 0.1 * first)


def test_dropout_acts_in_training_only() -> None:
    model = make_classifier(dropout=0.5)
    image = torch.tensor([[[[150.0]], [[60.0]]]])
    assert model.eval()({"image": image})["logits"].tolist() == [[1.0, 1.0]]
    batch = {"image": image.expand(64, 2, 1, 1), "label": torch.zeros(64, dtype=torch.int64)}
    # Features of 1 become 0 or 2, so some images have other logits than the rest.
    assert model.train()(batch)["loss_cls"].item() != pytest.approx(math.log(2))


def test_a_missing_label_is_named_in_training_and_unneeded_otherwise() -> None:
    batch = {"image": torch.zeros(1, 2, 1, 1), "index": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"needs batch\['label'\].*only \['image', 'index'\]"):
        make_classifier()(batch)
    assert "logits" in make_classifier().eval()(batch)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("label", "reach"), [(6, "from 1 to 6"), (-1, "from -1 to 1")])
def test_labels_beyond_the_classes_are_named(
    label: int, reach: str, label_smoothing: float
) -> None:
    batch = {"image": torch.zeros(2, 2, 1, 1), "label": torch.tensor([1, label])}
    error = rf"MODEL\.NUM_CLASSES is 2, so labels are in \[0, 2\), but .* reach {reach}\. Set"
    with pytest.raises(ConfigError, match=error):
        make_classifier(label_smoothing=label_smoothing)(batch)


def test_normalization_is_not_part_of_the_weights() -> None:
    assert list(make_classifier().state_dict()) == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("mean", "std"),
    [([1.0], [1.0, 1.0]), ([1.0], [0.0]), ([], []), ([1.0, 1.0], [1.0, -1.0]), ([1.0], [math.nan])],
)
def test_channels_without_a_mean_and_a_positive_std_are_refused(
    mean: list[float], std: list[float]
) -> None:
    with pytest.raises(ConfigError, match=r"PIXEL_MEAN is \[.*\] and MODEL\.PIXEL_STD is \["):
        ImageClassifier(Identity(), 2, pixel_mean=mean, pixel_std=std)


def test_bf16_outputs_come_as_float32() -> None:
    model = make_classifier().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model({"image": torch.zeros(1, 2, 1, 1)})["logits"].dtype == torch.float32


def test_the_model_learns_32_random_labels_by_heart() -> None:
    model = ImageClassifier(
        SmallResNet(1, (16, 32), (1, 1)), 10, pixel_mean=[127.5], pixel_std=[73.9]
    )
    image = torch.randint(0, 256, (32, 1, 14, 14), dtype=torch.uint8)
    batch = {"image": image, "label": torch.randint(0, 10, (32,))}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = model(batch)["loss_cls"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.05
