"""Small helps for the tests of projects that use trainkit.

To reload a LazyConfig as from a file: `LazyConfig.save(cfg, name)`, then `LazyConfig.load(name)`.
"""

from trainkit.utils.env import TORCH_VERSION


def min_torch_version(min_version: str) -> bool:
    """Whether the torch that runs is at least this one, as in "2.6"; patch releases do not count.

    Example:
        >>> min_torch_version("1.13")
        True
    """
    needed = tuple(int(part) for part in min_version.split(".")[:2])
    return needed <= TORCH_VERSION
