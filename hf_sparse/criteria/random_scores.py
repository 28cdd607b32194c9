"""Random scores: the baseline that any other criterion must beat."""

from dataclasses import dataclass
from typing import Any

import torch

from ..requires import Requires
from .base import Criterion, register_criterion


# Odd 64-bit constants of the splitmix64 finalizer, as signed numbers.
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


@register_criterion("random")
@dataclass(frozen=True)
class Random(Criterion):
    """A hash of the weight's position, uniform in [0, 1): equal at every prune step, on every rank and device.

    Example:
        >>> scores = Random().score(torch.zeros(10_000), torch.arange(10_000))
        >>> 0.49 < scores.mean() < 0.51
        tensor(True)

    Reference: Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014, for the hash.
    """

    requires = Requires.POSITION

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        bits = statistic.clone()
        for shift, factor in zip((30, 27), _MIX, strict=True):
            bits = (bits ^ _logical_right_shift(bits, shift)) * factor
        bits = bits ^ _logical_right_shift(bits, 31)
        return _logical_right_shift(bits, 40).to(torch.float32) / 2**24


def _logical_right_shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)
