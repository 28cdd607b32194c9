"""Base class of allocations, and the two ways in which they meet the target exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..methods import MethodRegistry
from ..requires import Requires


@dataclass(frozen=True)
class LayerSize:
    """What an allocation knows of a layer.

    Args:
        name: of the layer.
        units: the number of units that compete.
        rows, positions, columns: outputs, kernel positions and inputs of one matrix of the weight.
        least, most: the bounds of the layer's sparsity, from 0 to 1.
        outliers: the layer's outlier ratio, where the allocation requires `Requires.OUTLIERS`.
    """

    name: str
    units: int
    rows: int
    columns: int
    positions: int = 1
    least: float = 0.0
    most: float = 1.0
    outliers: float | None = None


class Allocation(ABC):
    """Distributes the target sparsity over the layers of a group, with scope row or layer.

    A subclass is registered with `register_allocation`; when it is a frozen dataclass, its fields are its options
    (`allocation_kwargs`).
    """

    requires: ClassVar[Requires] = Requires.NOTHING
    """`NOTHING`, or `OUTLIERS` to get `LayerSize.outliers`, which needs one-shot pruning."""

    @abstractmethod
    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        """Returns the sparsity of each layer by name.

        Args:
            target: the mean of the sparsities, weighted by units, from 0 to 1.
            layers: the layers of the group.

        Raises:
            ValueError: the layers' bounds leave no room for the target.
        """

    def outlier_ratio(self, scores: Sequence[torch.Tensor]) -> float:
        """Returns `LayerSize.outliers` of the layers of one block: by default the share of scores above 5 times their
        mean.

        Args:
            scores: |w|·‖x‖ of each layer of the block in this group, see `Wanda`.
        """
        return outlier_ratio(scores)


def outlier_ratio(scores: Sequence[torch.Tensor], multiple: float = 5.0) -> float:
    """Returns #{score > multiple·mean} / #{score}, over all tensors together.

    Raises:
        ValueError: there are no scores, or some are not finite.

    Example:
        >>> outlier_ratio([torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 60.0])])
        0.1

    Reference: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", 2023, section 3.
    """
    count = sum(tensor.numel() for tensor in scores)
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in scores)
    if not count or not np.isfinite(total):
        raise ValueError(f"the outlier ratio needs finite scores, but their sum is {total}, of {count} scores")
    return sum(int(torch.count_nonzero(tensor > multiple * total / count)) for tensor in scores) / count


ALLOCATIONS = MethodRegistry("allocation", Allocation, {Requires.NOTHING: Allocation, Requires.OUTLIERS: Allocation})
register_allocation = ALLOCATIONS.register


def scale_densities(raw: Sequence[float] | np.ndarray, ratio: float, layers: Sequence[LayerSize]) -> dict[str, float]:
    """Returns sparsities s_l = clamp(1 - ε·raw_l, least_l, most_l), with ε such that their mean, weighted by units, is
    `ratio`.

    Raises:
        ValueError: the layers' bounds leave no room for `ratio`.
    """
    densities = np.asarray(raw, dtype=np.float64)
    return _solve_level(lambda epsilon: 1.0 - epsilon * densities, 0.0, float(1.0 / densities.min()), ratio, layers)


def shift_sparsities(
    offsets: Sequence[float] | np.ndarray, ratio: float, layers: Sequence[LayerSize]
) -> dict[str, float]:
    """Returns sparsities s_l = clamp(offset_l - ε, least_l, most_l), with ε such that their mean, weighted by units,
    is `ratio`.

    Raises:
        ValueError: the layers' bounds leave no room for `ratio`.

    Example:
        >>> shares = shift_sparsities([0.0, 0.2], 0.5, [LayerSize("a", 10, 2, 5), LayerSize("b", 10, 2, 5)])
        >>> {name: round(share, 4) for name, share in shares.items()}
        {'a': 0.4, 'b': 0.6}
    """
    shifts = np.asarray(offsets, dtype=np.float64)
    low, high = float(shifts.min()) - 1.0, float(shifts.max())
    return _solve_level(lambda epsilon: shifts - epsilon, low, high, ratio, layers)


def _solve_level(
    sparsities: Callable[[float], np.ndarray], low: float, high: float, ratio: float, layers: Sequence[LayerSize]
) -> dict[str, float]:
    """Solves mean(clamp(sparsities(level))) = ratio by bisection; sparsities decrease from low to high."""
    units = np.array([layer.units for layer in layers], dtype=np.float64)
    least, most = (np.array([getattr(layer, side) for layer in layers]) for side in ("least", "most"))
    lowest, highest = (float(np.average(side, weights=units)) for side in (least, most))
    if not lowest - 1e-9 <= ratio <= highest + 1e-9:
        raise ValueError(
            f"sparsity {ratio:.4g} cannot be distributed: the layers' bounds allow {lowest:.4g} to {highest:.4g}. "
            "Change target_sparsity, min_sparsity_per_layer or max_sparsity_per_layer."
        )

    def bounded(level: float) -> np.ndarray:
        return np.clip(sparsities(level), least, most)

    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if np.average(bounded(middle), weights=units) > ratio else (low, middle)
    return {layer.name: float(s) for layer, s in zip(layers, bounded((low + high) / 2), strict=True)}
