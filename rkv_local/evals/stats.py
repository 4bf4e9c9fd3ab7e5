"""Intervals of shares and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson 1927), 95 % by default; (0, 1) of nothing.

    Raises:
        ValueError: correct is not from 0 to n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct is {correct}, must be from 0 to {n}")
    if n == 0:
        return 0.0, 1.0
    share, zz = correct / n, z * z
    middle = (share + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(share * (1 - share) / n + zz / (4 * n * n))
    # at the ends the formula is exact; rounding is not
    return 0.0 if correct == 0 else middle - half, 1.0 if correct == n else middle + half


def mean_interval(values: Sequence[float], z: float = Z95) -> tuple[float, float, float]:
    """(mean, low, high) of independent values by their standard error; the mean alone of a single one.

    Raises:
        ValueError: there are none.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values is empty, must have at least one")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, mean, mean
    half = z * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals have nothing in common."""
    return a[1] < b[0] or b[1] < a[0]
