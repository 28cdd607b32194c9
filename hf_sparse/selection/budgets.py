"""Whole numbers that sum to a total: the largest-remainder method with bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def apportion(total: int, shares: Sequence[float], least: Sequence[int], most: Sequence[int]) -> np.ndarray:
    """Whole numbers as close to `shares` as their bounds allow, that add up to `total` exactly.

    Shares are shifted by one common amount where the bounds bind, then rounded by the largest remainder, ties to the
    first.

    Returns: int64, of the length of `shares`.

    Raises:
        ValueError: `total` is less than the sum of `least` or more than that of `most`.

    Example:
        >>> apportion(10, [3.5, 3.5, 3.0], least=[0, 0, 0], most=[9, 9, 9]).tolist()
        [4, 3, 3]
        >>> apportion(10, [3.5, 3.5, 3.0], least=[0, 0, 0], most=[2, 9, 9]).tolist()
        [2, 4, 4]
    """
    shares = np.asarray(shares, dtype=np.float64)
    least, most = np.asarray(least, dtype=np.int64), np.asarray(most, dtype=np.int64)
    if not least.sum() <= total <= most.sum():
        raise ValueError(f"{total} units cannot be shared out: the bounds allow {least.sum()} to {most.sum()}.")
    low, high = float((least - shares).min()), float((most - shares).max())
    if np.all((least <= shares) & (shares <= most)) and abs(shares.sum() - total) < 0.5:
        low = high = 0.0
    for _ in range(100 if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(shares + middle, least, most).sum() < total else (low, middle)
    shares = np.clip(shares + (low + high) / 2, least, most)
    counts = np.floor(shares + 1e-9).astype(np.int64)
    _settle(counts, shares - counts, total, least, most)
    return counts


def _settle(counts: np.ndarray, remainders: np.ndarray, total: int, least: np.ndarray, most: np.ndarray) -> None:
    """Move `counts` to `total`, one unit at a time, the largest (or, downwards, smallest) remainder first."""
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = np.flatnonzero(counts < most if step > 0 else counts > least)
        order = room[np.argsort(-step * remainders[room], kind="stable")][: abs(missing)]
        counts[order] += step
