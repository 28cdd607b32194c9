"""Random scores: the baseline that any other criterion must beat."""

from dataclasses import dataclass
from typing import Any

import torch

from ..numerics import hash_uniform
from ..requires import Requires
from .base import Criterion, register_criterion


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
        return hash_uniform(statistic)
