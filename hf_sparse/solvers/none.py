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
    """

    updates = False

    def solve_batched(
        self, requests: Sequence[PruneRequest], statistic: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        solved = []
        for request in requests:
            if request.mask_RC is None or request.sparsity is not None:
                raise ValueError('solver "none" selects no units itself: give it a mask, made by a criterion')
            solved.append((torch.where(request.mask_RC, request.weight_RC.detach(), 0.0), request.mask_RC.clone()))
        return solved
