"""Base class of algorithms that sample a mask from trained logits, while the weights are frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .learned_mask import LearnedMask, MaskContext, Theta


@dataclass(frozen=True)
class SampledMask(LearnedMask):
    """w = W * m: m is a relaxed sample of a random mask, whose logits are trained; the weights W are frozen.

    The sample becomes hard while the logits become decisive: with the progress a from 0 to 1 of the prune steps, noise
    and logits are divided by the temperature tau, and logits are multiplied by kappa,

        tau = temperature_start + a * (temperature_end - temperature_start)
        kappa = 1 + a * (scale_end - 1).

    Args:
        prior: a checkpoint of the same model, a folder or a Hub name, whose zeros are the mask to start from, such as
            the output of `hf-sparse prune`. Only its zeros are read, not its values. Left out: the mask that keeps the
            largest weights.
        prior_strength: how far the logits prefer the first mask.
        learning_rate: of the logits.
        scale_end: kappa at the end.
        temperature_start, temperature_end: tau.
        norm_weight: weight of the term -sum w^2 of the loss, which keeps the norm of the weights that remain, so that
            their gradients do not vanish.
    """

    prior: str | None = None
    prior_strength: float = 3.0
    learning_rate: float = 0.2
    scale_end: float = 5.0
    temperature_start: float = 4.0
    temperature_end: float = 0.05
    norm_weight: float = 0.0

    trains_weights: ClassVar[bool] = False
    is_soft: ClassVar[bool] = True
    starts_from_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("learning_rate", "scale_end", "temperature_start", "temperature_end"):
            value = getattr(self, name)
            if not (0 < value < math.inf):
                default = type(self).__dataclass_fields__[name].default
                raise ValueError(f"`{name}` is {value}: it must be positive, as in {default}.")
        for name in ("prior_strength", "norm_weight"):
            value = getattr(self, name)
            if not (0 <= value < math.inf):
                raise ValueError(f"`{name}` is {value}: it must be 0 or more.")
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"`temperature_end` is {self.temperature_end}, above `temperature_start`, {self.temperature_start}: "
                "the temperature falls, so swap them."
            )
        if self.prior is not None and not self.prior:
            raise ValueError("`prior` is empty: it must be a folder or a Hub name. Or leave it out.")

    def scale(self, context: MaskContext) -> float:
        """Returns kappa."""
        return 1.0 + context.progress * (self.scale_end - 1.0)

    def temperature(self, context: MaskContext) -> float:
        """Returns tau."""
        return self.temperature_start + context.progress * (self.temperature_end - self.temperature_start)

    def penalty(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> torch.Tensor | None:
        if not self.norm_weight:
            return None
        return -self.norm_weight * self.weight(theta, dense, mask, context).square().sum()
