"""OWL: layers with many outliers are pruned less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .base import DenseLayer, LayerSize, MeasuringAllocation, register_allocation, shift_sparsities


@register_allocation("owl")
@dataclass(frozen=True)
class OWL(MeasuringAllocation):
    """Prunes blocks with many outliers, scores far above the mean, less, within each layer's bounds.

    s_l = target - λ·(D_l - D̄) / max_k |D_k - D̄|, where D_l is the outlier ratio of the layer's block and D̄ the mean
    over layers, weighted by units. No sparsity differs from the target by more than λ unless a bound is active.

    Args:
        m: a score of more than m times the mean is an outlier (the paper finds 3 to 10 good).
        lambda_: λ, the largest distance of a layer's sparsity from the target.

    Raises:
        ValueError: an option is out of range; `allocate`: a layer has no outlier ratio.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> sizes = {"units": 100, "rows": 10, "columns": 10}
        >>> layers = [LayerSize(name, **sizes, measured=D) for name, D in zip("abc", (0.04, 0.02, 0.03))]
        >>> {name: round(share, 4) for name, share in OWL().allocate(0.5, layers).items()}
        {'a': 0.42, 'b': 0.58, 'c': 0.5}

    Reference: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity", 2023, section 3.
    """

    m: float = 5.0
    lambda_: float = 0.08

    def __post_init__(self) -> None:
        if not self.m > 0:
            raise ValueError(f"`m` is {self.m}: it must be above 0, as in 5")
        if not 0 <= self.lambda_ <= 1:
            raise ValueError(f"`lambda_` is {self.lambda_}: it must be from 0 to 1, as in 0.08")

    def measure(self, layers: Sequence[DenseLayer]) -> list[float]:
        """Returns the outlier ratio of all layers together, for each."""
        ratio = outlier_ratio([score for layer in layers for score in layer.scores()], self.m)
        return [ratio] * len(layers)

    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        outliers = np.array(self.measured(layers), dtype=np.float64)
        deviations = outliers - np.average(outliers, weights=[layer.units for layer in layers])
        largest = np.abs(deviations).max()
        offsets = -self.lambda_ * deviations / largest if largest > 1e-12 else np.zeros_like(deviations)
        return shift_sparsities(offsets, target, layers)


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
