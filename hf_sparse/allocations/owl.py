"""OWL: layers with many outliers give less."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .base import LayerSize, register_allocation, shift_sparsities


OUTLIER = 5.0
"""A score this many times the mean is an outlier (M of the paper, which finds 3 to 10 good)."""

SPREAD = 0.08
"""How far a layer may be from the ratio (λ of the paper)."""


def outlier_share(scores: Sequence[torch.Tensor], multiple: float = OUTLIER) -> float:
    """D = #{score > multiple·mean} / #{score}, over all tensors together.

    Args:
        scores: Wanda's |w|·‖x‖, of one weight, or of all weights of one block, which the paper takes together.

    Returns: from 0 to 1.

    Raises:
        ValueError: there are no scores, or some are not finite.

    Example:
        >>> outlier_share([torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 60.0])])
        0.1

    Reference: as for `owl`.
    """
    count = sum(tensor.numel() for tensor in scores)
    total = sum(float(tensor.sum(dtype=torch.float64)) for tensor in scores)
    if not count or not np.isfinite(total):
        raise ValueError(f"the share of outliers needs finite scores, but their sum is {total}, of {count} scores.")
    return sum(int(torch.count_nonzero(tensor > multiple * total / count)) for tensor in scores) / count


@register_allocation("owl", needs="outliers")
def owl(ratio, layers):
    """s_l = ratio - λ·(D_l - D̄) / max|D_k - D̄|, as far as each layer's bounds allow: D_l is the layer's share of
    outliers, D̄ their mean weighted by units. No layer is further than λ = 0.08 from the ratio unless a bound is.

    Raises:
        ValueError: a layer has no share of outliers.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> sizes = {"name": "a", "units": 100, "rows": 10, "columns": 10}
        >>> layers = [LayerSize(**sizes | {"name": name}, outliers=D) for name, D in zip("abc", (0.04, 0.02, 0.03))]
        >>> {name: round(share, 4) for name, share in owl(0.5, layers).items()}
        {'a': 0.42, 'b': 0.58, 'c': 0.5}

    Reference: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity", 2023, section 3.
    """
    missing = [layer.name for layer in layers if layer.outliers is None]
    if missing:
        raise ValueError(
            f'allocation "owl" needs each layer\'s share of outliers, but {len(missing)} have none ("{missing[0]}" '
            "first): they come from inputs of the weights, which one-shot pruning observes."
        )
    return shift_sparsities(_offsets(layers), ratio, layers)


def _offsets(layers: Sequence[LayerSize]) -> np.ndarray:
    outliers = np.array([layer.outliers for layer in layers], dtype=np.float64)
    away = outliers - np.average(outliers, weights=[layer.units for layer in layers])
    widest = np.abs(away).max()
    return -SPREAD * away / widest if widest > 1e-12 else np.zeros_like(away)
