"""SNIP with momentum."""

import torch

from .base import GradientCriterion, register_criterion


@register_criterion("snip_momentum")
class SnipMomentum(GradientCriterion):
    """s <- 0.9·s + |w·g| over all steps: connection sensitivity, smoothed over about the last ten batches.

    Example:
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> SnipMomentum().saliency(weight, gradient, torch.empty(3))
        tensor([0.5000, 1.0000, 3.0000])

    Reference: Lee et al., "SNIP", 2019; the momentum form is the default of Intel Neural Compressor's pytorch_pruner.
    """

    decay = 0.9
    persistent = True

    def saliency(self, weight, gradient, out):
        return torch.mul(weight, gradient, out=out).abs_()
