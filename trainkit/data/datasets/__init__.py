"""The data sets that trainkit knows by name."""

from trainkit.data.datasets.fashion_mnist import FashionMNIST

__all__ = ["FashionMNIST"]
