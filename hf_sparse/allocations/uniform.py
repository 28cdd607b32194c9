"""Uniform: the same sparsity in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Allocation, LayerSize, register_allocation, scale_densities


@register_allocation("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """s_l = target, within each layer's bounds.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> Uniform().allocate(0.5, [LayerSize("a", 100, 10, 10), LayerSize("b", 50, 5, 10)])
        {'a': 0.5, 'b': 0.5}

    Reference: Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, section 3, "Uniform".
    """

    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        if all(layer.least <= target <= layer.most for layer in layers):
            return dict.fromkeys((layer.name for layer in layers), target)
        return scale_densities([1.0] * len(layers), target, layers)
