"""Movement."""

import torch

from .base import GradientCriterion, register_criterion


@register_criterion("movement")
class Movement(GradientCriterion):
    """Sum of -w·g over the whole training: positive for a weight that training drives away from zero.

    Example:
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> Movement().saliency(weight, gradient, torch.empty(3))
        tensor([-0.5000,  1.0000,  3.0000])

    Reference: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, eq. 5 (a pruned weight stays
    zero here, so its score stays as it is).
    """

    persistent = True

    def saliency(self, weight, gradient, out):
        return torch.mul(weight, gradient, out=out).neg_()
