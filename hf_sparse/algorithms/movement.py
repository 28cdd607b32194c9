"""Movement pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..numerics import keep_where_
from .base import register_algorithm
from .learned_mask import LearnedMask, MaskContext, Theta, check_learning_rate


@register_algorithm("movement")
@dataclass(frozen=True)
class Movement(LearnedMask):
    """Trains a score of each weight, also of pruned ones; the mask keeps the highest.

    w = M * W, where the mask M keeps the highest scores S. Gradients: dL/dS = g·W everywhere, also where M is 0
    (straight-through), and dL/dW = M * g, with the gradient g of the loss with respect to w. A pruned weight keeps its
    value, and returns when its score rises.

    Args:
        learning_rate: of Adam for S.
        init_scale: S starts at init_scale·|w|. The paper starts at 0, where after one step of Adam all scores are
            about ±learning_rate, so that the first masks follow from the signs of one gradient and the positions of
            weights; with 1 they are those of magnitude pruning, until scores have moved by more than |w|, after a few
            steps.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> W, mask, g = torch.tensor([1.0, -2.0]), torch.tensor([True, False]), torch.tensor([0.5, 0.5])
        >>> Movement().pull_back({"scores": W.abs()}, W, mask, g, None)
        ({'scores': tensor([ 0.5000, -1.0000])}, tensor([0.5000, 0.0000]))

    Reference: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, section 3.
    """

    learning_rate: float = 1e-2
    init_scale: float = 1.0

    default_scope = "global"

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        if not 0 <= self.init_scale < float("inf"):
            raise ValueError(f"`init_scale` is {self.init_scale}: it must be 0 or more, as in 1.0")

    def init(self, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> Theta:
        return {"scores": dense.abs().mul_(self.init_scale)}

    def weight(self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> torch.Tensor:
        scores = theta["scores"]
        return dense * (mask + (scores - scores.detach()))

    def scores(self, theta: Theta, dense: torch.Tensor, context: MaskContext) -> torch.Tensor:
        return theta["scores"]

    def pull_back(
        self,
        theta: Theta,
        dense: torch.Tensor,
        mask: torch.Tensor,
        gradient: torch.Tensor,
        context: MaskContext,
    ) -> tuple[Theta, torch.Tensor | None]:
        return {"scores": gradient * dense}, keep_where_(gradient, mask)
