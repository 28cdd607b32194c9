"""No weight update: the remaining weights keep their values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .base import PruneRequest, Solver, register_solver


@register_solver("none")
@dataclass(frozen=True)
class NoUpdate(Solver):
    """ŵ = w where the mask is True, 0 elsewhere.

    Example:
        >>> NoUpdate().solve(torch.tensor([[1.0, 2.0]]), mask_RC=torch.tensor([[True, False]]))
        (tensor([[1., 0.]]), tensor([[ True, False]]))

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, section 3.
    """

    updates = False

    def solve_batched(
        self, requests: Sequence[PruneRequest], statistic: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        solved = []
        for request in requests:
            mask_RC = request.required_mask("none")
            solved.append((torch.where(mask_RC, request.weight_RC.detach(), 0.0), mask_RC.clone()))
        return solved
