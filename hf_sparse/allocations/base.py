"""Base class of allocations, and the two ways in which they meet the target exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..methods import MethodRegistry
from ..patterns import Pattern
from ..requires import Requires
from ..statistics import GramMatrix, InputNorms


@dataclass(frozen=True)
class LayerSize:
    """What an allocation knows of a layer.

    Args:
        name: of the layer.
        units: the number of units that compete.
        rows, positions, columns: outputs, kernel positions and inputs of one matrix of the weight.
        least, most: the bounds of the layer's sparsity, from 0 to 1.
        measured: what a `MeasuringAllocation` has measured of the layer; else None.
    """

    name: str
    units: int
    rows: int
    columns: int
    positions: int = 1
    least: float = 0.0
    most: float = 1.0
    measured: Any = None


class Allocation(ABC):
    """Distributes the target sparsity over the layers of a group, with scope row or layer.

    A subclass is registered with `register_allocation`; when it is a frozen dataclass, its fields are its options
    (`allocation_kwargs`).
    """

    requires: ClassVar[Requires] = Requires.NOTHING
    """`NOTHING`; what a `MeasuringAllocation` requires is there."""

    @abstractmethod
    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        """Returns the sparsity of each layer by name.

        Args:
            target: the mean of the sparsities, weighted by units, from 0 to 1.
            layers: the layers of the group.

        Raises:
            ValueError: the layers' bounds leave no room for the target.
        """


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A layer of the dense model, and what was observed of its inputs.

    Args:
        weights: the matrices (R, C) of the layer, any floating dtype: one, or one for each expert.
        inputs: the statistic of the inputs of each matrix.
        pattern: of the units that are pruned.
        sensitivity: the sum over tokens of the mean squared gradient of the log-likelihood with respect to an output,
            where the allocation requires `OUTPUT_GRADIENTS`.

    Example:
        >>> from hf_sparse.patterns import get_pattern
        >>> inputs = InputNorms(2)
        >>> inputs.observe(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        >>> layer = DenseLayer([torch.tensor([[1.0, -2.0]])], [inputs], get_pattern("unstructured"))
        >>> next(layer.scores())
        tensor([[5., 2.]])
    """

    weights: Sequence[torch.Tensor]
    inputs: Sequence[InputNorms | GramMatrix]
    pattern: Pattern
    sensitivity: float = 1.0

    def scores(self) -> Iterator[torch.Tensor]:
        """Yields |w|·‖x‖ of each matrix, float32, see `Wanda`."""
        for weight_RC, statistic in zip(self.weights, self.inputs, strict=True):
            yield weight_RC.detach().float().abs() * statistic.norms


class MeasuringAllocation(Allocation):
    """An allocation that first measures each layer of the dense model, in one-shot pruning."""

    requires = Requires.DENSE_NORMS
    """`DENSE_NORMS`, or `DENSE_GRAM` to get a `GramMatrix` of the inputs of each matrix; either together with
    `OUTPUT_GRADIENTS` to get `DenseLayer.sensitivity`."""

    @abstractmethod
    def measure(self, layers: Sequence[DenseLayer]) -> Sequence[Any]:
        """Measures the dense weights and inputs of each layer, and returns each result, for `LayerSize.measured`.

        The results of all layers are in memory at once, so each should be small, such as a few numbers.

        Args:
            layers: those of one block in the group, in order; or all that are in no block.

        Raises:
            ValueError: weights or inputs are not finite.
        """

    def operations(self, rows: int, columns: int) -> float:
        """Returns the number of multiply-adds of `measure` for one matrix, for estimates of time."""
        return 0.0

    def measured(self, layers: Sequence[LayerSize]) -> list[Any]:
        """Returns `LayerSize.measured` of each layer.

        Raises:
            ValueError: a layer has not been measured.
        """
        missing = [layer.name for layer in layers if layer.measured is None]
        if missing:
            raise ValueError(
                f'`allocation` "{ALLOCATIONS.name_and_options(self)[0]}" needs a measurement of each layer, but '
                f'"{missing[0]}" has none, one of {len(missing)}: it is computed from the inputs of the weights, '
                "which one-shot pruning observes."
            )
        return [layer.measured for layer in layers]


ALLOCATIONS = MethodRegistry(
    "allocation",
    Allocation,
    {
        Requires.NOTHING: Allocation,
        Requires.DENSE_NORMS: MeasuringAllocation,
        Requires.DENSE_GRAM: MeasuringAllocation,
        Requires.DENSE_NORMS | Requires.OUTPUT_GRADIENTS: MeasuringAllocation,
        Requires.DENSE_GRAM | Requires.OUTPUT_GRADIENTS: MeasuringAllocation,
    },
)
register_allocation = ALLOCATIONS.register


def scale_densities(raw: Sequence[float] | np.ndarray, ratio: float, layers: Sequence[LayerSize]) -> dict[str, float]:
    """Returns sparsities s_l = clamp(1 - ε·raw_l, least_l, most_l), with ε such that their mean, weighted by units, is
    `ratio`.

    Raises:
        ValueError: the layers' bounds leave no room for `ratio`.
    """
    densities = np.asarray(raw, dtype=np.float64)
    return solve_level(lambda epsilon: 1.0 - epsilon * densities, 0.0, float(1.0 / densities.min()), ratio, layers)


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
    return solve_level(lambda epsilon: shifts - epsilon, low, high, ratio, layers)


def spread_sparsities(
    values: Sequence[float] | np.ndarray, half_width: float, ratio: float, layers: Sequence[LayerSize]
) -> dict[str, float]:
    """Returns sparsities that increase linearly with `values`, the largest 2·half_width above the smallest, within
    the layers' bounds, with mean `ratio`.

    Raises:
        ValueError: a value is not finite; the layers' bounds leave no room for `ratio`.

    Example:
        >>> layers = [LayerSize(name, 10, 2, 5) for name in "abc"]
        >>> shares = spread_sparsities([1.0, 5.0, 3.0], 0.1, 0.5, layers)
        >>> {name: round(share, 4) for name, share in shares.items()}
        {'a': 0.4, 'b': 0.6, 'c': 0.5}
    """
    distances = np.asarray(values, dtype=np.float64)
    if not np.isfinite(distances).all():
        raise ValueError(f"layers are measured by finite values, but have {distances.tolist()}")
    distances = distances - distances.min()
    largest = distances.max()
    offsets = 2 * half_width * distances / largest if largest > 0 else distances
    return shift_sparsities(offsets, ratio, layers)


def solve_level(
    sparsities: Callable[[float], np.ndarray], low: float, high: float, ratio: float, layers: Sequence[LayerSize]
) -> dict[str, float]:
    """Returns sparsities clamp(sparsities(level)) within the layers' bounds, with the level, found by bisection, at
    which their mean, weighted by units, is `ratio`.

    Args:
        sparsities: of the layers, in order; none increases from level `low` to `high`.

    Raises:
        ValueError: the layers' bounds leave no room for `ratio`.
    """
    units = np.array([layer.units for layer in layers], dtype=np.float64)
    least, most = (np.array([getattr(layer, side) for layer in layers]) for side in ("least", "most"))
    lowest, highest = (float(np.average(side, weights=units)) for side in (least, most))
    if not lowest - 1e-9 <= ratio <= highest + 1e-9:
        raise ValueError(
            f"sparsity {ratio:.4g} cannot be distributed: the layers' bounds allow {lowest:.4g} to {highest:.4g}. "
            "Change `target_sparsity`, `min_sparsity_per_layer` or `max_sparsity_per_layer`."
        )

    def bounded(level: float) -> np.ndarray:
        return np.clip(sparsities(level), least, most)

    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if np.average(bounded(middle), weights=units) > ratio else (low, middle)
    return {layer.name: float(s) for layer, s in zip(layers, bounded((low + high) / 2), strict=True)}
