"""The one rule for what runs every so many iterations."""


def is_due(iteration: int, period: int) -> bool:
    """Whether a job of this period runs after 0-based `iteration`; period 0 means never.

    Example:
        >>> [iteration for iteration in range(10) if is_due(iteration, 4)]
        [3, 7]
    """
    return period > 0 and (iteration + 1) % period == 0
