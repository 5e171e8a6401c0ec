"""Fashion-MNIST: 28x28 grey images of ten kinds of clothing, a small part of them in the package.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms" (arXiv:1708.07747), under the MIT license that lies beside the files. The names:

- `fashion_mnist_small_train`, `fashion_mnist_small_test`: the first 1,000 and 200 images of each
  class, embedded; `tools/make_fashion_mnist.py` made them.
- `fashion_mnist_train`, `fashion_mnist_test`: all 60,000 and 10,000, read from
  `$TRAINKIT_DATASETS/fashion-mnist`, or from where Debian installs them.
"""

import functools
import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from trainkit.data.catalog import DatasetCatalog, MetadataCatalog
from trainkit.utils.errors import ConfigError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
EMBEDDED_FOLDER = Path(__file__).parent / "fashion_mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


class FashionMNIST(Dataset[dict[str, Any]]):
    """One split of Fashion-MNIST, whole in memory.

    Item i is {"image": uint8 tensor of shape (1, 28, 28), a copy; "label": int in [0, 10)}.

    Args:
        folder: Holds the two files of the split, under their original names.
        split: "train" or "test".

    Raises:
        ConfigError: If a file is damaged, or the two do not fit each other.
        FileNotFoundError: If one is missing.
    """

    def __init__(self, folder: Path, split: str) -> None:
        images_path, labels_path = (folder / name for name in FILES[split])
        self.images = read_idx(images_path, ndim=3).unsqueeze(1)
        self.labels: list[int] = read_idx(labels_path, ndim=1).tolist()
        if self.images.shape[1:] != (1, 28, 28):
            raise ConfigError(
                f"The images in {images_path} are {tuple(self.images.shape[2:])} pixels large, not "
                "(28, 28). This is not Fashion-MNIST; put the original file there."
            )
        largest = max(self.labels, default=0)
        if len(self.images) != len(self.labels) or largest >= len(CLASSES):
            raise ConfigError(
                f"{labels_path} holds {len(self.labels)} labels up to {largest}, but the "
                f"{len(self.images)} images beside it need one each, below {len(CLASSES)}. Put the "
                "two original files there."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # A copy: a transform that works in place must not change what the next epoch reads.
        return {"image": self.images[index].clone(), "label": self.labels[index]}


def read_idx(path: Path, ndim: int) -> torch.Tensor:
    """Reads a gzipped IDX file of unsigned bytes, the format of MNIST.

    A big-endian header holds 0x0000, the type (0x08), the number of dimensions and each dimension's
    size as 32 bits; the data follow in C order.

    Args:
        path: The file.
        ndim: The number of dimensions that it has to have.

    Returns:
        A uint8 tensor with `ndim` dimensions.

    Raises:
        ConfigError: If the file is not such a file, or cut short, or damaged.
    """
    try:
        with gzip.open(path, "rb") as file:
            header = file.read(4 + 4 * ndim)
            if header[:4] != bytes([0, 0, 8, ndim]) or len(header) < 4 + 4 * ndim:
                raise ConfigError(
                    f"{path} begins with {header[:4].hex()}, but a {ndim}-dimensional IDX file of "
                    f"bytes begins with 000008{ndim:02x} and {ndim} sizes. Put the original there."
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            # To the end, where gzip compares its checksum.
            data = bytearray(file.read())
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ConfigError(f"{path} is damaged ({e}). Put the original file there.") from None
    if len(data) != math.prod(shape):
        raise ConfigError(
            f"{path} should hold {math.prod(shape)} bytes of data, as its header's sizes {shape} "
            f"say, but holds {len(data)}. Put the original file there."
        )
    return torch.frombuffer(data, dtype=torch.uint8).reshape(shape)


def _load_full(split: str) -> FashionMNIST:
    datasets = os.environ.get("TRAINKIT_DATASETS")
    folders = [Path(datasets) / "fashion-mnist"] if datasets else []
    folders.append(DEBIAN_FOLDER)
    for folder in folders:
        if all((folder / name).is_file() for name in FILES[split]):
            return FashionMNIST(folder, split)
    raise ConfigError(
        f"The full Fashion-MNIST ({split}) is not in {' or '.join(map(str, folders))}. Run "
        f"`apt install dataset-fashion-mnist`, or put {' and '.join(FILES[split])} from "
        "https://github.com/zalandoresearch/fashion-mnist into a folder fashion-mnist and set "
        "TRAINKIT_DATASETS to the folder that it is in."
    )


for _split in FILES:
    DatasetCatalog.register(
        f"fashion_mnist_small_{_split}", functools.partial(FashionMNIST, EMBEDDED_FOLDER, _split)
    )
    DatasetCatalog.register(f"fashion_mnist_{_split}", functools.partial(_load_full, _split))
    MetadataCatalog.get(f"fashion_mnist_small_{_split}").set(classes=CLASSES)
    MetadataCatalog.get(f"fashion_mnist_{_split}").set(classes=CLASSES)
