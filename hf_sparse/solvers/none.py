"""No weight update: the remaining weights keep their values."""

from dataclasses import dataclass

import torch

from .base import Solver, register_solver


@register_solver("none")
@dataclass(frozen=True)
class NoUpdate(Solver):
    """ŵ = w where the mask is True, 0 elsewhere.

    Example:
        >>> NoUpdate().solve(torch.tensor([[1.0, 2.0]]), mask_RC=torch.tensor([[True, False]]))
        (tensor([[1., 0.]]), tensor([[ True, False]]))
    """

    def solve_batched(self, requests, statistic=None):
        if any(request.sparsity is not None for request in requests):
            raise ValueError('solver "none" selects no units itself: give it a mask, made by a criterion')
        return [
            (torch.where(request.mask_RC, request.weight_RC.detach(), 0.0), request.mask_RC.clone())
            for request in requests
        ]
