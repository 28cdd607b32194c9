"""Erdős-Rényi: wide layers give more."""

from .base import register_allocation, scale_densities


@register_allocation("erdos_renyi")
def erdos_renyi(ratio, layers):
    """1 - s_l = ε·(rows + columns + positions') / (rows·columns·positions), where positions' counts only for
    convolutions (positions > 1): the density of a layer falls with its size.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> shares = erdos_renyi(0.5, [LayerSize("square", 100, 10, 10), LayerSize("wide", 400, 10, 40)])
        >>> {name: round(share, 4) for name, share in shares.items()}
        {'square': 0.2857, 'wide': 0.5536}

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity",
    2018; for convolutions (ERK) Evci et al., "Rigging the Lottery", 2020.
    """
    raw = []
    for layer in layers:
        kernel = layer.positions if layer.positions > 1 else 0
        raw.append((layer.rows + layer.columns + kernel) / (layer.rows * layer.columns * layer.positions))
    return scale_densities(raw, ratio, layers)
