"""RigL: the lowest weights are exchanged for those with the largest gradients."""

from dataclasses import dataclass

from .base import register_algorithm
from .dynamic import SparseFromStart
from .growth import LargestGradient


@register_algorithm("rigl")
@dataclass(frozen=True)
class RigL(SparseFromStart):
    """Training at the target sparsity from the start. Each prune step prunes a fraction of the remaining weights, the
    lowest by the criterion, and as many others return: those with the largest |gradient|.

    Args:
        fraction: of the remaining weights that the first prune step exchanges, from 0 to 1.
        decay: of that fraction over the prune steps: "cosine", as published, "linear" or "constant".
        initial_mask: "magnitude", or "random", as published.

    Example:
        >>> RigL(fraction=0.2).exchanged_fraction(10, 20)
        0.1

    Reference: Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020.
    """

    reads_gradients = True

    def growth(self, prune_step: int) -> LargestGradient:
        return LargestGradient()
