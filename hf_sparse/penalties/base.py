"""Base class of penalties: terms of the loss that draw weights towards zero."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..methods import MethodRegistry


_SMALLEST = 1e-30
"""Norms below are divided by this instead, so that no quotient overflows."""


@dataclass(frozen=True)
class Penalty(ABC):
    """A term of the training loss, the sum over units u of a function of the norm of the unit's weights:

        strength(t) · sum_u value(||w_u||, n_u)

    n_u is the number of weights of a unit. Only its gradient is computed, and added to that of the loss right before
    each optimizer step, when gradients are complete: neither the scale of the loss, nor accumulation, nor the number
    of ranks changes it, and it is not clipped. A subclass is a frozen dataclass whose fields are its options
    (`penalty_kwargs`), registered with `register_penalty`.

    Args:
        strength: factor of the term, positive.
        warmup: the strength increases linearly from 0 over this many optimizer steps, or over this fraction of
            training when below 1.
        until_prune_end: whether the strength is 0 after the last prune step, when the masks are final and the term
            would only shrink what is kept.

    Example:
        >>> @register_penalty("ridge")
        ... @dataclass(frozen=True)
        ... class Ridge(Penalty):
        ...     by_unit = False
        ...
        ...     def value(self, norms, size):
        ...         return norms.square()
        ...
        ...     def slope(self, norms, size):
        ...         return 2 * norms
        >>> ridge = PENALTIES.create("ridge", {"strength": 0.1, "warmup": 4})
        >>> [round(ridge.strength_at(step, max_steps=20, prune_end=6), 3) for step in (1, 2, 4, 6, 7)]
        [0.025, 0.05, 0.1, 0.1, 0.0]
    """

    strength: float = 1e-4
    warmup: float = 0.0
    until_prune_end: bool = True

    by_unit: ClassVar[bool] = True
    """Whether units are those of the pattern; False: each weight is a unit, whatever the pattern."""

    def __post_init__(self) -> None:
        if not 0 < self.strength < math.inf:
            raise ValueError(f"`strength` is {self.strength}: it must be positive, as in 1e-4")
        if not (0 <= self.warmup < 1 or self.warmup == self.warmup // 1 < math.inf):
            raise ValueError(
                f"`warmup` is {self.warmup}: it must be a whole number of steps, or a fraction of training below 1"
            )

    @abstractmethod
    def value(self, norms: torch.Tensor, size: int) -> torch.Tensor:
        """Returns the term of each unit.

        Args:
            norms: the norms of the units' weights, of any shape, floating point; not modified.
            size: the number of weights of a unit.
        """

    @abstractmethod
    def slope(self, norms: torch.Tensor, size: int) -> torch.Tensor:
        """Returns the derivative of `value` with respect to the norms, of their shape. A unit that is zero gets no
        gradient, whatever the slope is there."""

    def coefficients(self, norms: torch.Tensor, size: int) -> torch.Tensor:
        """Returns c of each unit, with which the gradient of `value` is c·w: slope / ||w_u||, and 0 for zero units."""
        slopes = self.slope(norms, size) / norms.clamp(min=_SMALLEST)
        return slopes.masked_fill_(norms == 0, 0)

    def strength_at(self, step: int, max_steps: int, prune_end: int) -> float:
        """Returns the strength at an optimizer step.

        Args:
            step: optimizer step, from 1.
            max_steps: of the training.
            prune_end: optimizer step of the last prune step.
        """
        if self.until_prune_end and step > prune_end:
            return 0.0
        warmup = self.warmup * max_steps if self.warmup < 1 else self.warmup
        return self.strength * min(1.0, step / warmup) if warmup else self.strength


PENALTIES = MethodRegistry("penalty", Penalty)
"""Penalty classes by name."""
register_penalty = PENALTIES.register
