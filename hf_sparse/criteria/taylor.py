"""First-order Taylor."""

import torch

from .base import GradientCriterion, register_criterion


@register_criterion("taylor")
class Taylor(GradientCriterion):
    """Sum of (w·g)² since the last prune step: the squared first-order change of the loss.

    While weights stand still, as in one-shot pruning, it is `fisher`.

    Example:
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> Taylor().saliency(weight, gradient, torch.empty(3))
        tensor([0.2500, 1.0000, 9.0000])

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, eq. 8.
    """

    def saliency(self, weight, gradient, out):
        return torch.mul(weight, gradient, out=out).square_()
