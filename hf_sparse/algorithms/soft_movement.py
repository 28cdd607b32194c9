"""Soft movement pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ..patterns import Pattern
from .base import register_algorithm
from .learned_mask import MaskContext, Theta
from .movement import Movement


@register_algorithm("soft_movement")
@dataclass(frozen=True)
class SoftMovement(Movement):
    """Movement pruning with M = [sigmoid(S) > tau], and with the penalty lambda·mean(sigmoid(S)) on the scores S.

    Gradients are those of movement pruning, and that of the penalty, which lowers the scores of weights that the loss
    does not need. tau and lambda rise from 0 to their values at the last prune step, along 1 - (1 - progress)³.

    Where fewer weights are below tau than the schedule demands, or more than the target, the mask keeps the highest
    scores up to the scheduled sparsity instead. The last prune step always does, so that the target is met exactly.

    Args:
        learning_rate: of Adam for S.
        init_scale: S starts at init_scale·|w|.
        threshold: tau, between 0 and 1.
        lambda_: the weight of the penalty; the mean is over all selected weights.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> S = torch.tensor([0.0, 4.0])
        >>> SoftMovement(threshold=0.6).keep(S, progress=1.0)
        tensor([False,  True])

    Reference: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, sections 3 and 4.
    """

    threshold: float = 0.1
    lambda_: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"`threshold` is {self.threshold}: it must be between 0 and 1, as in 0.1")
        if not 0 <= self.lambda_ < float("inf"):
            raise ValueError(f"`lambda_` is {self.lambda_}: it must be 0 or more, as in 100.0")

    def keep(self, scores: torch.Tensor, progress: float) -> torch.Tensor:
        """Returns which weights are above the threshold, given the progress of the schedule, from 0 to 1."""
        return torch.sigmoid(scores) > self.threshold * _warm_up(progress)

    def penalty(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> torch.Tensor | None:
        return self._lambda(context) * torch.sigmoid(theta["scores"]).sum()

    def early_mask(self, theta: Theta, dense: torch.Tensor, context: MaskContext) -> torch.Tensor | None:
        return self.keep(theta["scores"], context.progress)

    def pull_back(
        self,
        theta: Theta,
        dense: torch.Tensor,
        mask: torch.Tensor,
        gradient: torch.Tensor,
        context: MaskContext,
    ) -> tuple[Theta, torch.Tensor | None]:
        gradients, weight_gradient = super().pull_back(theta, dense, mask, gradient, context)
        share = torch.sigmoid(theta["scores"])
        gradients["scores"].addcmul_(share, 1 - share, value=self._lambda(context))
        return gradients, weight_gradient

    def metrics(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> Mapping[str, torch.Tensor]:
        below = torch.count_nonzero(~self.keep(theta["scores"], context.progress)).double()
        return {
            **super().metrics(theta, dense, mask, context),
            "below_threshold": below / context.num_weights,
        }

    def option_errors(self, options: SimpleNamespace, pattern: Pattern) -> list[str]:
        errors = super().option_errors(options, pattern)
        if not pattern.flat and not errors:
            errors.append(
                f'`algorithm` "{options.algorithm}" compares single weights with a threshold, not units of `pattern` '
                f'"{pattern}": use `pattern="unstructured"`, or an algorithm that ranks units, as '
                '`algorithm="gradual"`.'
            )
        return errors

    def _lambda(self, context: MaskContext) -> float:
        return self.lambda_ * _warm_up(context.progress) / context.num_weights


def _warm_up(progress: float) -> float:
    return 1 - (1 - progress) ** 3
