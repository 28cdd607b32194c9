"""What an allocation is, and the two exact divisions that every one of them rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..registry import Registry


ALLOCATIONS = Registry("allocation")
"""Functions `allocate(ratio, layers) -> {name: sparsity}`."""


def register_allocation(name: str, needs: str = "sizes") -> Callable:
    """A decorator that files an allocation under `name`. It needs "sizes" alone, or also "outliers" (see `LayerSize`),
    which come from the inputs of the weights and so only in one-shot pruning."""

    def file(allocate: Callable) -> Callable:
        ALLOCATIONS.register(name)(allocate)
        allocate.needs = needs
        return allocate

    return file


@dataclass(frozen=True)
class LayerSize:
    """What an allocation knows of a layer: `units` that compete, the weight's `rows` outputs, `positions` of a kernel
    and `columns` inputs, the least and largest sparsity it may get, and, if counted, its share of `outliers` (0 to 1,
    see `outlier_share`)."""

    name: str
    units: int
    rows: int
    columns: int
    positions: int = 1
    least: float = 0.0
    most: float = 1.0
    outliers: float | None = None


def scale_densities(raw: Sequence[float], ratio: float, layers: Sequence[LayerSize]) -> dict[str, float]:
    """Sparsities s_l = clamp(1 - ε·raw_l, least_l, most_l) with the one ε that makes their mean, weighted by units,
    equal to `ratio`.

    Raises:
        ValueError: no ε does: the bounds leave no room for `ratio`.
    """
    raw = np.asarray(raw, dtype=np.float64)
    return _settle_level(lambda epsilon: 1.0 - epsilon * raw, 0.0, float(1.0 / raw.min()), ratio, layers)


def shift_sparsities(offsets: Sequence[float], ratio: float, layers: Sequence[LayerSize]) -> dict[str, float]:
    """Sparsities s_l = clamp(offset_l - ε, least_l, most_l) with the one ε that makes their mean, weighted by units,
    equal to `ratio`.

    Raises:
        ValueError: no ε does: the bounds leave no room for `ratio`.

    Example:
        >>> shares = shift_sparsities([0.0, 0.2], 0.5, [LayerSize("a", 10, 2, 5), LayerSize("b", 10, 2, 5)])
        >>> {name: round(share, 4) for name, share in shares.items()}
        {'a': 0.4, 'b': 0.6}
    """
    offsets = np.asarray(offsets, dtype=np.float64)
    low, high = float(offsets.min()) - 1.0, float(offsets.max())
    return _settle_level(lambda epsilon: offsets - epsilon, low, high, ratio, layers)


def _settle_level(
    sparsities: Callable[[float], np.ndarray], low: float, high: float, ratio: float, layers: Sequence[LayerSize]
) -> dict[str, float]:
    """`sparsities` of the number from low (most is pruned) to high (least) whose mean within the bounds is `ratio`."""
    units = np.array([layer.units for layer in layers], dtype=np.float64)
    least, most = (np.array([getattr(layer, side) for layer in layers]) for side in ("least", "most"))
    lowest, highest = (float(np.average(side, weights=units)) for side in (least, most))
    if not lowest - 1e-9 <= ratio <= highest + 1e-9:
        raise ValueError(
            f"sparsity {ratio:.4g} cannot be shared out: the layers' bounds allow {lowest:.4g} to {highest:.4g}. "
            "Change target_sparsity, min_sparsity_per_layer or max_sparsity_per_layer."
        )

    def bounded(level: float) -> np.ndarray:
        return np.clip(sparsities(level), least, most)

    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if np.average(bounded(middle), weights=units) > ratio else (low, middle)
    return {layer.name: float(s) for layer, s in zip(layers, bounded((low + high) / 2), strict=True)}
