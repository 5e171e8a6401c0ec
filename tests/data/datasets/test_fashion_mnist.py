import gzip
import struct
from pathlib import Path

import pytest
import torch

from trainkit.data.catalog import DatasetCatalog, MetadataCatalog
from trainkit.data.datasets import fashion_mnist
from trainkit.data.datasets.fashion_mnist import (
    CLASSES,
    DEBIAN_FOLDER,
    EMBEDDED_FOLDER,
    FILES,
    FashionMNIST,
    read_idx,
)
from trainkit.utils.errors import ConfigError


def write_idx(path: Path, data: torch.Tensor, magic: int = 8) -> None:
    header = struct.pack(f">I{data.ndim}I", magic << 8 | data.ndim, *data.shape)
    path.write_bytes(gzip.compress(header + data.numpy().tobytes()))


def write_split(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in zip(FILES["test"], (images, labels), strict=True):
        write_idx(folder / name, data)
    return folder


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_the_embedded_splits_are_balanced(split: str, per_class: int) -> None:
    dataset = DatasetCatalog.get(f"fashion_mnist_small_{split}")
    assert len(dataset) == 10 * per_class
    assert torch.bincount(torch.tensor(dataset.labels)).tolist() == [per_class] * 10
    # Blank images would be a reading error; real ones are neither black nor white on average.
    assert 60 < dataset.images.float().mean() < 85


def test_an_item_is_an_image_and_its_label() -> None:
    dataset = FashionMNIST(EMBEDDED_FOLDER, "test")
    item = dataset[0]
    assert item["image"].shape == (1, 28, 28)
    assert item["image"].dtype == torch.uint8
    assert type(item["label"]) is int
    assert CLASSES[item["label"]] == "Ankle boot"


def test_changing_an_item_in_place_leaves_the_data_set_alone() -> None:
    dataset = FashionMNIST(EMBEDDED_FOLDER, "test")
    before = dataset[3]["image"].clone()
    dataset[3]["image"].zero_()
    assert torch.equal(dataset[3]["image"], before)


@pytest.mark.parametrize("size", ["", "small_"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_classes_are_metadata(size: str, split: str) -> None:
    name = f"fashion_mnist_{size}{split}"
    assert name in DatasetCatalog
    assert MetadataCatalog.get(name).classes == CLASSES


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_full_data_set_reads_from_debians_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINKIT_DATASETS", raising=False)
    dataset = DatasetCatalog.get("fashion_mnist_test")
    assert torch.bincount(torch.tensor(dataset.labels)).tolist() == [1000] * 10


def test_the_full_data_set_is_read_from_the_users_folder_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_split(
        tmp_path / "fashion-mnist",
        torch.zeros(3, 28, 28, dtype=torch.uint8),
        torch.tensor([0, 9, 1], dtype=torch.uint8),
    )
    monkeypatch.setenv("TRAINKIT_DATASETS", str(tmp_path))
    assert DatasetCatalog.get("fashion_mnist_test").labels == [0, 9, 1]


def test_a_missing_data_set_says_where_it_was_sought_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("TRAINKIT_DATASETS", str(tmp_path / "own"))
    with pytest.raises(ConfigError, match="apt install dataset-fashion-mnist") as error:
        DatasetCatalog.get("fashion_mnist_train")
    assert str(tmp_path / "own" / "fashion-mnist") in str(error.value)
    assert str(tmp_path / "debian") in str(error.value)
    assert "train-images-idx3-ubyte.gz" in str(error.value)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    labels = torch.zeros(2, dtype=torch.uint8)
    write_split(tmp_path, torch.zeros(2, 32, 32, dtype=torch.uint8), labels)
    with pytest.raises(ConfigError, match=r"are \(32, 32\) pixels large, not \(28, 28\)"):
        FashionMNIST(tmp_path, "test")


@pytest.mark.parametrize("labels", [[1, 2, 3], [1, 10]])
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[int]) -> None:
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    write_split(tmp_path, images, torch.tensor(labels, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=rf"{len(labels)} labels up to {max(labels)}, but the 2 "):
        FashionMNIST(tmp_path, "test")


def test_idx_files_are_read_back(tmp_path: Path) -> None:
    data = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "data.gz", data)
    assert torch.equal(read_idx(tmp_path / "data.gz", ndim=3), data)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "floats.gz", torch.zeros(2, dtype=torch.uint8), magic=0x0D)
    with pytest.raises(ConfigError, match="begins with 00000d01, but a 1-dimensional"):
        read_idx(tmp_path / "floats.gz", ndim=1)
    write_idx(tmp_path / "labels.gz", torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="begins with 00000801, but a 3-dimensional"):
        read_idx(tmp_path / "labels.gz", ndim=3)
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ConfigError, match="begins with , but"):
        read_idx(tmp_path / "empty.gz", ndim=1)


def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(ConfigError, match=r"plain.gz is damaged \(Not a gzipped file"):
        read_idx(tmp_path / "plain.gz", ndim=1)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "cut.gz", torch.randint(0, 256, (5000,)).to(torch.uint8))
    whole = (tmp_path / "cut.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[:3000])
    with pytest.raises(ConfigError, match=r"cut.gz is damaged \(Compressed file ended"):
        read_idx(tmp_path / "cut.gz", ndim=1)


def test_no_flipped_bit_changes_the_data_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "flipped.gz"
    data = torch.arange(40, dtype=torch.uint8)
    write_idx(path, data)
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert torch.equal(read_idx(path, ndim=1), data)
        except ConfigError:
            noticed += 1
    # The header's time and system and some padding mean nothing.
    assert noticed > 0.8 * len(whole)


@pytest.mark.parametrize("size", [3, 5])
def test_data_that_the_header_does_not_announce_is_refused(tmp_path: Path, size: int) -> None:
    content = struct.pack(">HBBI", 0, 8, 1, 4) + bytes(size)
    (tmp_path / "odd.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ConfigError, match=rf"should hold 4 bytes .* but holds {size}"):
        read_idx(tmp_path / "odd.gz", ndim=1)
