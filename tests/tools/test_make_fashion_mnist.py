import gzip
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.data.datasets.fashion_mnist import (
    DEBIAN_FOLDER,
    EMBEDDED_FOLDER,
    FILES,
    FashionMNIST,
    read_idx,
)

TOOL = Path(__file__).parents[2] / "tools" / "make_fashion_mnist.py"


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


@pytest.fixture
def source(tmp_path: Path, tool: dict[str, Any]) -> Path:
    """A stand-in for the original: three images of each class, more of class 0."""
    folder = tmp_path / "source"
    folder.mkdir()
    for images, labels in FILES.values():
        classes = torch.arange(37, dtype=torch.uint8) % 10
        pixels = torch.arange(37, dtype=torch.uint8)[:, None, None].expand(37, 28, 28)
        tool["write_idx"](folder / images, pixels)
        tool["write_idx"](folder / labels, classes)
    return folder


def test_the_first_of_each_class_keep_their_order(tool: dict[str, Any]) -> None:
    labels = torch.tensor([3, 1, 1, 3, 0, 1, 3], dtype=torch.uint8)
    assert tool["first_of_each_class"](labels, 2).tolist() == [0, 1, 2, 3, 4]
    assert tool["first_of_each_class"](labels, 1).tolist() == [0, 1, 4]


def test_a_split_is_cut_to_the_same_number_of_each_class(
    tmp_path: Path, source: Path, tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tool["IMAGES_PER_CLASS"], "test", 3)
    tool["make_split"](source, tmp_path, "test")
    dataset = FashionMNIST(tmp_path, "test")
    assert dataset.labels == [i % 10 for i in range(30)]
    assert dataset.images[:, 0, 5, 5].tolist() == list(range(30))


def test_the_command_writes_the_same_bytes_each_time(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [tmp_path / "first", tmp_path / "second"]
    for output in outputs:
        argv = [str(TOOL), "--source", str(source), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(TOOL), run_name="__main__")
    for names in FILES.values():
        for name in names:
            first, second = ((output / name).read_bytes() for output in outputs)
            assert first == second
            # No name and no time of writing in the gzip header.
            assert first[3:8] == bytes(5)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_embedded_files_are_what_the_tool_makes(tool: dict[str, Any], split: str) -> None:
    images, labels = FILES[split]
    all_labels = read_idx(DEBIAN_FOLDER / labels, ndim=1)
    chosen = tool["first_of_each_class"](all_labels, tool["IMAGES_PER_CLASS"][split])
    embedded = FashionMNIST(EMBEDDED_FOLDER, split)
    assert embedded.labels == all_labels[chosen].tolist()
    original = read_idx(DEBIAN_FOLDER / images, ndim=3)[chosen]
    assert torch.equal(embedded.images.squeeze(1), original)


def test_the_embedded_files_come_with_their_license() -> None:
    license_text = (EMBEDDED_FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "2017 Zalando SE" in license_text
    size = sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir())
    assert size < 6_000_000
    for names in FILES.values():
        for name in names:
            with gzip.open(EMBEDDED_FOLDER / name) as file:
                assert file.read(2) == b"\0\0"
