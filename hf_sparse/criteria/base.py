"""The kinds of criterion: those that look at the weight, or also at its inputs, and those that sum up gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..registry import Registry


CRITERIA = Registry("criterion")
register_criterion = CRITERIA.register


class Criterion(ABC):
    """One number per weight; higher is kept.

    A criterion is elementwise: it sees any part of a weight, of any shape, with the same part of what it needs.
    """

    needs: str = "nothing"
    """What `score` gets as `stat`: "nothing" (None), "position" (int64 positions, unique over all layers), "gradient"
    (a sum of `GradientCriterion.saliency` over optimizer steps) or "inputs" (float32, the norm of each weight's input,
    of a shape that broadcasts to the weight's: (C,) for a matrix (R, C)). Training does not observe inputs."""

    @abstractmethod
    def score(self, weight: torch.Tensor, stat: torch.Tensor | None) -> torch.Tensor:
        """Scores of `weight`'s shape: float32, detached, finite where weight and stat are; inputs are untouched."""


class GradientCriterion(Criterion):
    """A criterion whose score is a sum over optimizer steps: total <- decay·total + saliency(weight, gradient)."""

    needs = "gradient"
    decay: float = 1.0
    persistent: bool = False
    """Whether the sum goes on after a prune step; if not, it starts over."""

    @abstractmethod
    def saliency(self, weight: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write one step's saliency into `out`; all three are float32 of one shape. Returns `out`."""

    def score(self, weight: torch.Tensor, stat: torch.Tensor | None) -> torch.Tensor:
        """The sum itself."""
        return stat.detach().clone()
