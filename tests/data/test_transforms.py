from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trainkit.data.transforms import (
    Compose,
    ImageMapper,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    Transform,
)
from trainkit.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    return iter([None])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.arange(1, 1 + 2 * 6 * 8, dtype=torch.uint8).reshape(2, 6, 8)


def test_crop_moves_the_image_over_all_places(image: torch.Tensor) -> None:
    crop = RandomCrop(1)
    padded = torch.zeros(2, 8, 10, dtype=torch.uint8)
    padded[:, 1:-1, 1:-1] = image
    places = {(y, x): padded[:, y : y + 6, x : x + 8].tolist() for y in range(3) for x in range(3)}
    seen = [crop(image).tolist() for _ in range(200)]
    assert all(result in places.values() for result in seen)
    assert all(place in seen for place in places.values())


def test_crop_may_move_the_image_out_of_sight() -> None:
    image = torch.arange(1, 1 + 4 * 6).reshape(1, 4, 6)
    padded = torch.zeros(1, 24, 26, dtype=torch.int64)
    padded[:, 10:14, 10:16] = image
    places = {str(padded[:, y : y + 4, x : x + 6].tolist()) for y in range(21) for x in range(21)}
    crop = RandomCrop(10)
    seen = {str(crop(image).tolist()) for _ in range(2000)}
    # 77 of the 441 places show some of the image; all others are the same zeros.
    assert len(places) == 78
    assert seen == places


@pytest.mark.parametrize("padding", [0, 28, 29, 40, 1000])
def test_crop_takes_any_padding(padding: int) -> None:
    image = torch.ones(1, 28, 28, dtype=torch.uint8)
    crop = RandomCrop(padding)
    results = [crop(image) for _ in range(50)]
    assert {(result.shape, result.dtype) for result in results} == {(image.shape, image.dtype)}
    assert bool((results[0] == image).all()) == (padding == 0)


def test_flip_mirrors_as_often_as_asked(image: torch.Tensor) -> None:
    mirrored = torch.flip(image, [2])
    assert torch.equal(RandomHorizontalFlip(1)(image), mirrored)
    assert torch.equal(RandomHorizontalFlip(0)(image), image)
    flip = RandomHorizontalFlip(0.25)
    count = sum(torch.equal(flip(image), mirrored) for _ in range(1000))
    assert 200 < count < 300


def erased_box(image: torch.Tensor, erased: torch.Tensor) -> tuple[int, int]:
    changed = (image != erased).all(0)
    rows, columns = changed.any(1), changed.any(0)
    assert torch.equal(changed, rows[:, None] & columns[None, :])
    return int(rows.sum()), int(columns.sum())


def test_erasing_fills_rectangles_of_the_asked_area_and_ratio() -> None:
    image = torch.full((3, 100, 100), 7.0)
    erase = RandomErasing(1.0, area=(0.05, 0.2), ratio=(0.5, 2.0), value=-1)
    boxes = torch.tensor([erased_box(image, erase(image)) for _ in range(300)]).double()
    areas, ratios = boxes.prod(1) / 10_000, boxes[:, 0] / boxes[:, 1]
    assert 0.048 < areas.min() < 0.06
    assert 0.19 < areas.max() < 0.205
    assert 0.45 < ratios.min() < 0.55
    assert 1.8 < ratios.max() < 2.2
    assert 0.4 < (ratios < 1).double().mean() < 0.6
    assert erase(image).unique().tolist() == [-1, 7]


def test_erasing_happens_as_often_as_asked(image: torch.Tensor) -> None:
    erase = RandomErasing(0.25)
    count = sum(not torch.equal(erase(image), image) for _ in range(1000))
    assert 180 < count < 300
    assert RandomErasing(0)(image) is image


def test_erasing_cuts_a_rectangle_that_is_too_long() -> None:
    image = torch.ones(1, 4, 40)
    erase = RandomErasing(1.0, area=(0.5, 0.5), ratio=(3, 3))
    assert erased_box(image, erase(image)) == (4, 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "transform", [RandomCrop(2), RandomHorizontalFlip(1.0), RandomErasing(1.0)]
)
def test_transforms_keep_shape_dtype_and_input(transform: Transform, dtype: torch.dtype) -> None:
    image = torch.ones(1, 28, 28, dtype=dtype)
    for _ in range(5):
        result = transform(image)
        assert (result.shape, result.dtype) == (image.shape, dtype)
    assert bool((image == 1).all())


def test_compose_applies_in_order() -> None:
    transform = Compose([lambda x: x + 1, lambda x: x * 10])
    assert transform(torch.tensor(1)).item() == 20


def test_the_mapper_changes_the_image_of_a_copy() -> None:
    sample: dict[str, Any] = {"image": torch.tensor(1), "label": 4}
    mapped = ImageMapper(lambda image: image + 1)(sample)
    assert mapped == {"image": torch.tensor(2), "label": 4}
    assert sample["image"].item() == 1


@pytest.mark.parametrize(
    ("sample", "words"), [((1, 2), "not a tuple. Set"), ({"x": 1}, r"not a dict of \['x'\]")]
)
def test_the_mapper_explains_samples_without_images(sample: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ImageMapper(lambda image: image)(sample)
