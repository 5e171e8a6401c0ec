"""Makes the embedded part of Fashion-MNIST from the original: its first images of each class.

Usage: python tools/make_fashion_mnist.py [--source FOLDER] [--output FOLDER]
"""

import argparse
import gzip
import struct
from pathlib import Path

import torch

from trainkit.data.datasets.fashion_mnist import (
    CLASSES,
    DEBIAN_FOLDER,
    EMBEDDED_FOLDER,
    FILES,
    read_idx,
)

IMAGES_PER_CLASS = {"train": 1000, "test": 200}


def first_of_each_class(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices of the first `count` entries of each class, in ascending order."""
    per_class = [torch.nonzero(labels == label).flatten()[:count] for label in range(len(CLASSES))]
    return torch.cat(per_class).sort().values


def write_idx(path: Path, data: torch.Tensor) -> None:
    """Writes a uint8 tensor as a gzipped IDX file, the same bytes each time."""
    header = struct.pack(f">HBB{data.ndim}I", 0, 8, data.ndim, *data.shape)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0) as file,
    ):
        file.write(header + data.contiguous().numpy().tobytes())


def make_split(source: Path, output: Path, split: str) -> None:
    """Writes the two files of one split."""
    images_name, labels_name = FILES[split]
    labels = read_idx(source / labels_name, ndim=1)
    chosen = first_of_each_class(labels, IMAGES_PER_CLASS[split])
    write_idx(output / images_name, read_idx(source / images_name, ndim=3)[chosen])
    write_idx(output / labels_name, labels[chosen])


def main() -> None:
    """Reads the command line and writes both splits."""
    parser = argparse.ArgumentParser(description="Make the embedded part of Fashion-MNIST.")
    parser.add_argument("--source", type=Path, default=DEBIAN_FOLDER, help="the original files")
    parser.add_argument("--output", type=Path, default=EMBEDDED_FOLDER, help="where to write")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for split in IMAGES_PER_CLASS:
        make_split(args.source, args.output, split)


if __name__ == "__main__":
    main()
