"""SNIP: connection sensitivity."""

from dataclasses import dataclass

from ..statistics import ProductSaliency
from .base import GradientCriterion, register_criterion


@register_criterion("snip")
@dataclass(frozen=True)
class Snip(GradientCriterion):
    """Σ |w·g| over the steps since the last prune step: the first-order change of the loss when a weight is removed.

    Example:
        >>> import torch
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> Snip().saliency(weight, gradient, torch.empty(3))
        tensor([0.5000, 1.0000, 3.0000])

    Reference: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019, eq. 5.
    """

    saliency = ProductSaliency(weighted=True, function="abs")
