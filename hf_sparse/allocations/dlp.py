"""DLP: blocks with a large median score are pruned more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .base import DenseLayer, LayerSize, MeasuringAllocation, register_allocation, spread_sparsities


@register_allocation("dlp")
@dataclass(frozen=True)
class DLP(MeasuringAllocation):
    """Prunes blocks with a large median score more, within each layer's bounds.

    s_l = c + 2α·(M_l - min_k M_k) / (max_k M_k - min_k M_k), where M_l is the median of |w|·‖x‖ over all weights of
    the layer's block: a large one says that the block's weights are much alike, without a few that matter most. The
    constant c gives the mean its target.

    Args:
        alpha: α, half the largest difference of two sparsities.

    Raises:
        ValueError: an option is out of range; `allocate`: a layer has not been measured.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> sizes = {"units": 100, "rows": 10, "columns": 10}
        >>> layers = [LayerSize(name, **sizes, measured=median) for name, median in zip("abc", (1.0, 5.0, 3.0))]
        >>> {name: round(share, 4) for name, share in DLP(alpha=0.1).allocate(0.5, layers).items()}
        {'a': 0.4, 'b': 0.6, 'c': 0.5}

    Reference: Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", 2025, section 3.
    """

    alpha: float = 0.08

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` is {self.alpha}: it must be from 0 to 1, as in 0.08")

    def measure(self, layers: Sequence[DenseLayer]) -> list[float]:
        """Returns the median score of all layers together, for each."""
        scores = torch.cat([score.flatten() for layer in layers for score in layer.scores()])
        return [float(scores.median())] * len(layers)

    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        return spread_sparsities(self.measured(layers), self.alpha, target, layers)
