"""The diagonal of the empirical Fisher information."""

from dataclasses import dataclass
from typing import Any

import torch

from ..statistics import ProductSaliency
from .base import GradientCriterion, register_criterion


@register_criterion("fisher")
@dataclass(frozen=True)
class Fisher(GradientCriterion):
    """w²·Σ g² over the steps since the last prune step.

    The saliency of Optimal Brain Damage with the diagonal of the empirical Fisher matrix in place of the Hessian's, up
    to a factor that all weights share. With constant weights, as in one-shot pruning, it equals `taylor`.

    Example:
        >>> weight, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
        >>> Fisher().saliency(weight, gradient, torch.empty(3))
        tensor([0.2500, 0.2500, 1.0000])
        >>> Fisher().score(weight, torch.tensor([0.25, 0.25, 1.0]))
        tensor([0.2500, 1.0000, 9.0000])

    Reference: LeCun et al., "Optimal Brain Damage", 1989, eq. 5; Theis et al., "Faster gaze prediction with dense
    networks and Fisher pruning", 2018, eq. 10.
    """

    saliency = ProductSaliency(weighted=False, function="square")

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        return weight.detach().float().square().mul_(statistic)
