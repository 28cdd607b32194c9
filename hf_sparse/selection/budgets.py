"""Integer budgets that sum to a total: the largest-remainder method with bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def largest_remainder(total: int, shares: ArrayLike, floors: ArrayLike, caps: ArrayLike) -> np.ndarray:
    """Rounds real shares to integers within bounds that sum to `total` exactly.

        counts_i = round(clamp(shares_i + e, floors_i, caps_i))

    One common shift e makes the clamped shares sum to `total`; it is 0 where no bound binds. All are rounded down,
    then the largest remainders are rounded up until the sum is `total`, the first of equal remainders first.

    Args:
        total: the sum of the result.
        shares: (N) real numbers, whose sum is close to `total`.
        floors: (N) the smallest count of each entry.
        caps: (N) the largest count of each entry.

    Returns:
        (N) int64 counts.

    Raises:
        ValueError: `total` is smaller than the sum of `floors` or larger than the sum of `caps`.

    Example:
        >>> largest_remainder(10, [3.5, 3.5, 3.0], floors=[0, 0, 0], caps=[9, 9, 9]).tolist()
        [4, 3, 3]
        >>> largest_remainder(10, [3.5, 3.5, 3.0], floors=[0, 0, 0], caps=[2, 9, 9]).tolist()
        [2, 4, 4]
    """
    ideal = np.asarray(shares, dtype=np.float64)
    floors, caps = np.asarray(floors, dtype=np.int64), np.asarray(caps, dtype=np.int64)
    if not floors.sum() <= total <= caps.sum():
        raise ValueError(f"{total} units cannot be distributed: the bounds allow {floors.sum()} to {caps.sum()}.")
    low, high = float((floors - ideal).min()), float((caps - ideal).max())
    if np.all((floors <= ideal) & (ideal <= caps)) and abs(ideal.sum() - total) < 0.5:
        low = high = 0.0
    for _ in range(100 if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(ideal + middle, floors, caps).sum() < total else (low, middle)
    bounded = np.clip(ideal + (low + high) / 2, floors, caps)
    counts = np.floor(bounded + 1e-9).astype(np.int64)
    remainders = bounded - counts
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        candidates = np.flatnonzero(counts < caps if step > 0 else counts > floors)
        order = np.argsort(-step * remainders[candidates], kind="stable")
        counts[candidates[order[: abs(missing)]]] += step
    return counts
