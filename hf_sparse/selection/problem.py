"""The selection problem: which k units of several layers are pruned, with bounds for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .scores import Scores


@dataclass(frozen=True)
class SelectionProblem:
    """Prune the k lowest units of L layers, at least floors[l] and at most caps[l] units of layer l.

    Args:
        layers: (L) scores of each layer.
        k: number of units to prune.
        floors: (L) int64, the smallest number of units to prune of each layer.
        caps: (L) int64, the largest number of units to prune of each layer.
        layer_indices: (L) names of the layers in error messages.

    Raises:
        ValueError: floors or caps are invalid, or no selection of k units satisfies them.
    """

    layers: Sequence[Scores]
    k: int
    floors: np.ndarray
    caps: np.ndarray
    layer_indices: Sequence[int]

    @classmethod
    def create(
        cls,
        layers: Sequence[Scores],
        k: int,
        floors: Sequence[int] | None = None,
        caps: Sequence[int] | None = None,
        layer_indices: Sequence[int] | None = None,
    ) -> SelectionProblem:
        """Creates a problem; None stands for floors of 0, caps of all units and indices from 0."""
        sizes = [layer.numel for layer in layers]
        floors = [0] * len(sizes) if floors is None else floors
        caps = sizes if caps is None else caps
        indices = range(len(sizes)) if layer_indices is None else layer_indices
        return cls(layers, int(k), np.array(floors, dtype=np.int64), np.array(caps, dtype=np.int64), indices)

    def __post_init__(self) -> None:
        sizes, floors, caps = self.sizes, self.floors, self.caps
        if not len(floors) == len(sizes) == len(caps):
            raise ValueError(
                f"{len(sizes)} layers need as many floors and caps, but got {len(floors)} and {len(caps)}"
            )
        for index in np.flatnonzero((floors < 0) | (floors > caps) | (caps > sizes))[:1]:
            raise ValueError(
                f"layer {index} needs 0 <= floor <= cap <= {sizes[index]}, the number of its units, but its floor is "
                f"{floors[index]} and its cap {caps[index]}"
            )
        if not floors.sum() <= self.k <= caps.sum():
            raise ValueError(
                f"k is {self.k}, but {floors.sum()} to {caps.sum()} of the layers' {sizes.sum()} units can be pruned: "
                "change k, lower the floors or raise the caps"
            )

    @cached_property
    def sizes(self) -> np.ndarray:
        """(L) number of units of each layer."""
        return np.array([layer.numel for layer in self.layers], dtype=np.int64)

    @cached_property
    def is_bounded(self) -> bool:
        """Whether any floor or cap can bind."""
        return bool(self.floors.any() or (self.caps != self.sizes).any())

    def num_pruned(self, counts: np.ndarray) -> np.ndarray:
        """Returns how many units of each layer (L) are pruned if `counts` (L) of them are below the threshold."""
        return np.clip(counts, self.floors, self.caps)

    def total_pruned(self, counts: np.ndarray) -> float:
        """Returns the sum of `num_pruned`."""
        return self.num_pruned(counts).sum()
