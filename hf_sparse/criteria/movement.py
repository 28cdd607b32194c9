"""Movement pruning."""

from dataclasses import dataclass

from ..statistics import ProductSaliency
from .base import GradientCriterion, register_criterion


@register_criterion("movement")
@dataclass(frozen=True)
class Movement(GradientCriterion):
    """Σ -w·g over all steps: positive for a weight that training moves away from zero.

    Example:
        >>> import torch
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> Movement().saliency(weight, gradient, torch.empty(3))
        tensor([-0.5000,  1.0000,  3.0000])

    Reference: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, eq. 5. A pruned weight
    remains zero here, so its score no longer changes.
    """

    persistent = True

    saliency = ProductSaliency(weighted=True, function="neg")
