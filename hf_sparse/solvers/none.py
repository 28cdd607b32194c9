"""Zero: what survives stays as it is."""

import torch

from .base import Solver, register_solver


@register_solver("zero")
class Zero(Solver):
    """ŵ = w where the mask is True, 0 elsewhere.

    Example:
        >>> Zero().solve(torch.tensor([[1.0, 2.0]]), mask_RC=torch.tensor([[True, False]]))
        (tensor([[1., 0.]]), tensor([[ True, False]]))
    """

    def solve_batched(self, wanted, stat=None):
        if any(each.sparsity is not None for each in wanted):
            raise ValueError('solver "zero" chooses nothing by itself: give it a mask, made by a criterion')
        return [(torch.where(each.mask_RC, each.weight_RC.detach(), 0.0), each.mask_RC.clone()) for each in wanted]
