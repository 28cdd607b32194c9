"""OWL: layers with many outliers are pruned less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..requires import Requires
from .base import Allocation, LayerSize, outlier_ratio, register_allocation, shift_sparsities


@register_allocation("owl")
@dataclass(frozen=True)
class OWL(Allocation):
    """s_l = target - λ·(D_l - D̄) / max_k |D_k - D̄|, within each layer's bounds.

    D_l is the outlier ratio of the layer's block and D̄ the mean over layers, weighted by units. No sparsity differs
    from the target by more than λ unless a bound is active.

    Args:
        m: a score of more than m times the mean is an outlier (the paper finds 3 to 10 good).
        lambda_: λ, the largest distance of a layer's sparsity from the target.

    Raises:
        ValueError: an option is out of range; `allocate`: a layer has no outlier ratio.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> sizes = {"units": 100, "rows": 10, "columns": 10}
        >>> layers = [LayerSize(name, **sizes, outliers=D) for name, D in zip("abc", (0.04, 0.02, 0.03))]
        >>> {name: round(share, 4) for name, share in OWL().allocate(0.5, layers).items()}
        {'a': 0.42, 'b': 0.58, 'c': 0.5}

    Reference: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity", 2023, section 3.
    """

    m: float = 5.0
    lambda_: float = 0.08

    requires = Requires.OUTLIERS

    def __post_init__(self) -> None:
        if not self.m > 0:
            raise ValueError(f"m is {self.m}: it must be above 0, as in 5")
        if not 0 <= self.lambda_ <= 1:
            raise ValueError(f"lambda_ is {self.lambda_}: it must be from 0 to 1, as in 0.08")

    def outlier_ratio(self, scores: Sequence[torch.Tensor]) -> float:
        return outlier_ratio(scores, self.m)

    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        missing = [layer.name for layer in layers if layer.outliers is None]
        if missing:
            raise ValueError(
                f'allocation "owl" needs the outlier ratio of each layer, but "{missing[0]}" has none, one of '
                f"{len(missing)}: it is computed from the inputs of the weights, which one-shot pruning observes."
            )
        outliers = np.array([layer.outliers for layer in layers], dtype=np.float64)
        deviations = outliers - np.average(outliers, weights=[layer.units for layer in layers])
        largest = np.abs(deviations).max()
        offsets = -self.lambda_ * deviations / largest if largest > 1e-12 else np.zeros_like(deviations)
        return shift_sparsities(offsets, target, layers)
