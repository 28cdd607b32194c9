"""Uniform: every layer the same."""

from .base import register_allocation, scale_densities


@register_allocation("uniform")
def uniform(ratio, layers):
    """s_l = ratio, as far as each layer's bounds allow.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> uniform(0.5, [LayerSize("a", 100, 10, 10), LayerSize("b", 50, 5, 10)])
        {'a': 0.5, 'b': 0.5}
    """
    shares = scale_densities([1.0] * len(layers), ratio, layers)
    free = all(layer.least <= ratio <= layer.most for layer in layers)
    return dict.fromkeys(shares, ratio) if free else shares
