"""Erdős-Rényi: larger layers are pruned more."""

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Allocation, LayerSize, register_allocation, scale_densities


@register_allocation("erdos_renyi")
@dataclass(frozen=True)
class ErdosRenyi(Allocation):
    """1 - s_l = ε·(rows + columns + positions') / (rows·columns·positions), where positions' counts only for
    convolutions (positions > 1): the density of a layer decreases with its size.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> shares = ErdosRenyi().allocate(0.5, [LayerSize("square", 100, 10, 10), LayerSize("wide", 400, 10, 40)])
        >>> {name: round(share, 4) for name, share in shares.items()}
        {'square': 0.2857, 'wide': 0.5536}

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity",
    2018; for convolutions (ERK) Evci et al., "Rigging the Lottery", 2020.
    """

    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        raw = []
        for layer in layers:
            kernel = layer.positions if layer.positions > 1 else 0
            raw.append((layer.rows + layer.columns + kernel) / (layer.rows * layer.columns * layer.positions))
        return scale_densities(raw, target, layers)
