"""Gradient magnitude."""

from dataclasses import dataclass

from ..statistics import ProductSaliency
from .base import GradientCriterion, register_criterion


@register_criterion("gradient")
@dataclass(frozen=True)
class Gradient(GradientCriterion):
    """Σ |g| over the steps since the last prune step.

    Example:
        >>> import torch
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> Gradient().saliency(weight, gradient, torch.empty(3))
        tensor([0.5000, 0.5000, 1.0000])

    Reference: Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, which grows weights by it.
    """

    saliency = ProductSaliency(weighted=False, function="abs")
