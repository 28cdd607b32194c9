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

    The gradient of strength_t / 2 ‖x - z + u‖^2 is added to that of the loss. The projection is the nearest point in
    the norm of Adam's second moment v, Σ v (z - x - u)^2: it keeps the units with the largest v (x + u)^2. The
    strength grows linearly with the prune steps, strength_t = strength * c / n after prune step c of n.

    Args:
        strength: positive; lambda in the paper.

    Example:
        >>> ELSA(strength=0.1).scores(torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.25]))
        tensor([4.0000, 2.2500])

    Reference: Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM", 2025.
    """

    strength: float = 0.01

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"strength is {self.strength}: it must be positive, as in 0.01")

    def strength_at(self, fraction: float) -> float:
        return self.strength * fraction

    def scores(self, point: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
        return point.square().mul_(second_moment)
