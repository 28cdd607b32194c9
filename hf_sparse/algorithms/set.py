"""Sparse evolutionary training: the lowest weights are exchanged for random ones."""

from dataclasses import dataclass

from .base import register_algorithm
from .dynamic import SparseFromStart
from .growth import RandomGrowth


@register_algorithm("set")
@dataclass(frozen=True)
class SET(SparseFromStart):
    """Training at the target sparsity from the start. Each prune step prunes a fraction of the remaining weights, the
    lowest by the criterion, and as many others return at random, the same on any number of ranks.

    Args:
        fraction: of the remaining weights that the first prune step exchanges, from 0 to 1.
        decay: of that fraction over the prune steps: "cosine", "linear" or "constant", as published.
        initial_mask: "magnitude", or "random", as published.

    Example:
        >>> SET().exchanged_fraction(10, 20)
        0.15

    Reference: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science", 2018.
    """

    def growth(self, prune_step: int) -> RandomGrowth:
        return RandomGrowth(prune_step)
