"""First-order Taylor expansion of the loss."""

from dataclasses import dataclass

from ..statistics import ProductSaliency
from .base import GradientCriterion, register_criterion


@register_criterion("taylor")
@dataclass(frozen=True)
class Taylor(GradientCriterion):
    """Σ (w·g)² over the steps since the last prune step: the squared first-order change of the loss.

    With constant weights, as in one-shot pruning, it equals `fisher`.

    Example:
        >>> import torch
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> Taylor().saliency(weight, gradient, torch.empty(3))
        tensor([0.2500, 1.0000, 9.0000])

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, eq. 8.
    """

    saliency = ProductSaliency(weighted=True, function="square")
