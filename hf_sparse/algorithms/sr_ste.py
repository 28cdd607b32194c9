"""SR-STE: sparse training from scratch with the sparse-refined straight-through estimator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import register_algorithm
from .learned_mask import LearnedMask, MaskContext, Theta


@register_algorithm("sr_ste")
@dataclass(frozen=True)
class SRSTE(LearnedMask):
    """w = M * W, where M keeps the largest magnitudes of W, selected anew at each prune step.

    Gradient: dL/dW = g + decay·(1 - M) * W, with the gradient g of the loss with respect to w passed to all of W
    (straight-through). The decay shrinks pruned weights, so that fewer of them return. With the option `prune_every`
    of 1 the mask is selected after each optimizer step, as in the paper.

    Args:
        decay: of the pruned weights.

    Raises:
        ValueError: decay is negative.

    Example:
        >>> W, mask, g = torch.tensor([1.0, -2.0]), torch.tensor([True, False]), torch.tensor([0.5, 0.5])
        >>> SRSTE(decay=0.1).pull_back({}, W, mask, g, None)
        ({}, tensor([0.5000, 0.3000]))

    Reference: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, eq. 9.
    """

    decay: float = 2e-4

    default_scope = "global"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"`decay` is {self.decay}: it must be 0 or more, as in 2e-4")

    def init(self, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> Theta:
        return {}

    def weight(self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> torch.Tensor:
        return dense + (dense * mask - dense).detach()

    def penalty(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> torch.Tensor | None:
        return self.decay / 2 * (dense * ~mask).square().sum()

    def scores(self, theta: Theta, dense: torch.Tensor, context: MaskContext) -> torch.Tensor:
        return dense.abs()

    def pull_back(
        self,
        theta: Theta,
        dense: torch.Tensor,
        mask: torch.Tensor,
        gradient: torch.Tensor,
        context: MaskContext,
    ) -> tuple[Theta, torch.Tensor | None]:
        return {}, gradient.addcmul_(dense, (~mask).to(dense.dtype), value=self.decay)
