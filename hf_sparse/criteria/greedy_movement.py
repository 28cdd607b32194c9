"""Movement scores of the weights that are kept."""

from dataclasses import dataclass

from ..statistics import ProductSaliency
from .base import GradientCriterion, register_criterion


@register_criterion("greedy_movement")
@dataclass(frozen=True)
class GreedyMovement(GradientCriterion):
    """Σ -w·g over all steps: positive for a weight that training moves away from zero.

    Greedy, because a pruned weight remains zero, so that its score no longer changes. The algorithm of the paper, in
    which pruned weights can return, is `algorithm="movement"`.

    Example:
        >>> import torch
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> GreedyMovement().saliency(weight, gradient, torch.empty(3))
        tensor([-0.5000,  1.0000,  3.0000])

    Reference: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, eq. 5.
    """

    persistent = True

    saliency = ProductSaliency(weighted=True, function="neg")
