"""ELSA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import register_algorithm
from .constrained import ConstrainedTraining


@register_algorithm("elsa")
@dataclass(frozen=True)
class ELSA(ConstrainedTraining):
    """ADMM on the loss itself, without a layerwise surrogate: weights are drawn to the nearest sparse point.

    Each optimizer step on the loss is followed by x <- x - strength_t (x + u) where z is zero. The strength grows
    linearly with the prune steps, strength_t = strength * c / n after prune step c of n. The zeros of z are those of
    the point that is nearest to x + u in the norm Σ v^weighting (z - x - u)^2: it keeps the units with the largest
    v^weighting (x + u)^2, where v is the second moment of the optimizer.

    Unlike in the paper, the penalty is decoupled from Adam, as the decay of AdamW is, and z follows x where it is not
    zero. Added to the gradient, the penalty moves a weight by no more than about the learning rate in a step, while u
    accumulates how far it still has to go; and a fixed z holds the weights that are kept.

    Args:
        strength: above 0, up to 1: the fraction of the distance to z - u that a weight covers in one optimizer step at
            the end of the schedule.
        weighting: from 0, the Euclidean norm, to 1, that of the paper.

    Example:
        >>> ELSA().scores(torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.25]))
        tensor([4.0000, 2.2500])

    Reference: Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM", 2025.
    """

    strength: float = 0.3
    weighting: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength` is {self.strength}: it must be above 0 and at most 1, as in 0.3")
        if not 0 <= self.weighting <= 1:
            raise ValueError(f"`weighting` is {self.weighting}: it must be from 0 to 1, as in 0.5")

    @property
    def needs_second_moment(self) -> bool:
        return self.weighting > 0

    def strength_at(self, fraction: float) -> float:
        return self.strength * fraction

    def scores(self, point: torch.Tensor, second_moment: torch.Tensor | None) -> torch.Tensor:
        scores = point.square()
        if second_moment is None:
            return scores
        return scores.mul_(second_moment if self.weighting == 1 else second_moment**self.weighting)
