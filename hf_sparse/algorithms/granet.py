"""GraNet: gradual pruning with regrowth by gradients."""

from dataclasses import dataclass

from .base import register_algorithm
from .dynamic import Exchange
from .growth import LargestGradient


@register_algorithm("granet")
@dataclass(frozen=True)
class GraNet(Exchange):
    """Gradual pruning, whose prune steps also exchange a fraction of the remaining weights, the lowest by the
    criterion, for the pruned ones with the largest |gradient|.

    Args:
        fraction: of the remaining weights, before its decay, from 0 to 1.
        decay: of that fraction over the prune steps: "cosine", as published, "linear" or "constant".

    Example:
        >>> GraNet().exchanged_fraction(10, 20)
        0.25

    Reference: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", 2021.
    """

    fraction: float = 0.5

    reads_gradients = True

    def growth(self, prune_step: int) -> LargestGradient:
        return LargestGradient()
