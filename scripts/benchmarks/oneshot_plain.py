"""Wanda, SparseGPT and ALPS as their papers describe them: each layer by itself, nothing shared, no shortcuts.

The reference of `oneshot.py`, for decoders of transformers that have their blocks in `model.layers`.

Shapes: R rows, C inputs of a weight; T tokens.

Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023; Frantar & Alistarh,
"SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023; Meng et al., "ALPS: Improved
Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn


BLOCK = 128
DAMPENING = 0.01
ITERATIONS = 30
RELAXATION = 1.6
PENALTIES = (0.1, 4.0)
"""The penalty of the first and the last iterations of ALPS; every second one raises it."""


class Phases(Protocol):
    def phase(self, name: str) -> AbstractContextManager: ...


class _Stop(Exception):
    """Raised when the first block is reached."""


class Norms:
    """(C) mean squares of the inputs."""

    def __init__(self, columns: int):
        self.mean_C, self.count = torch.zeros(columns), 0

    def add(self, x: torch.Tensor) -> None:
        x_TC = x.reshape(-1, x.shape[-1])
        total = self.count + len(x_TC)
        self.mean_C = self.mean_C * (self.count / total) + x_TC.square().sum(0) / total
        self.count = total

    @property
    def norms_C(self) -> torch.Tensor:
        return self.mean_C.sqrt()


class Hessian:
    """(C, C) means of products of the inputs, doubled."""

    def __init__(self, columns: int):
        self.mean_CC, self.count = torch.zeros(columns, columns), 0

    def add(self, x: torch.Tensor) -> None:
        x_TC = x.reshape(-1, x.shape[-1])
        total = self.count + len(x_TC)
        self.mean_CC *= self.count / total
        scaled_TC = x_TC * (2 / total) ** 0.5
        self.mean_CC += scaled_TC.t() @ scaled_TC
        self.count = total

    @property
    def norms_C(self) -> torch.Tensor:
        return (self.mean_CC.diagonal() / 2).sqrt()


def wanda_mask(weight_RC: torch.Tensor, norms_C: torch.Tensor, sparsity: float, of_four: bool) -> torch.Tensor:
    """Returns the mask (R, C), True is kept: prunes the lowest scores of each row, or two of every four."""
    scores_RC = weight_RC.abs() * norms_C
    kept_RC = torch.ones_like(weight_RC, dtype=torch.bool)
    if of_four:
        lowest = scores_RC.view(-1, 4).topk(2, dim=1, largest=False)[1]
        kept_RC.view(-1, 4).scatter_(1, lowest, False)
        return kept_RC
    order_RC = scores_RC.sort(dim=1, stable=True)[1]
    return kept_RC.scatter_(1, order_RC[:, : round(sparsity * weight_RC.shape[1])], False)


def sparsegpt(
    weight_RC: torch.Tensor, hessian: Hessian, sparsity: float, of_four: bool, mask_RC: torch.Tensor | None
) -> torch.Tensor:
    """Returns the new weights (R, C). The columns to the right of a pruned one compensate for it, column by column."""
    weight_RC, hessian_CC = weight_RC.clone(), hessian.mean_CC.clone()
    columns = weight_RC.shape[1]
    dead_C = hessian_CC.diagonal() == 0
    hessian_CC[dead_C, dead_C] = 1
    weight_RC[:, dead_C] = 0
    hessian_CC.diagonal().add_(DAMPENING * hessian_CC.diagonal().mean())
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(hessian_CC))
    upper_CC = torch.linalg.cholesky(inverse_CC, upper=True)
    for start in range(0, columns, BLOCK):
        stop = min(columns, start + BLOCK)
        part_RB, upper_BB = weight_RC[:, start:stop].clone(), upper_CC[start:stop, start:stop]
        error_RB = torch.zeros_like(part_RB)
        falls_RB = torch.zeros_like(part_RB, dtype=torch.bool)
        if mask_RC is not None:
            falls_RB = ~mask_RC[:, start:stop]
        elif not of_four:
            scores_RB = part_RB.square() / upper_BB.diagonal().square()
            cut = scores_RB.flatten().sort()[0][round(sparsity * scores_RB.numel()) - 1]
            falls_RB = scores_RB <= cut
        for j in range(stop - start):
            if mask_RC is None and of_four and j % 4 == 0:
                scores = part_RB[:, j : j + 4].square() / upper_BB.diagonal()[j : j + 4].square()
                falls_RB.scatter_(1, j + scores.topk(2, dim=1, largest=False)[1], True)
            old_R = part_RB[:, j]
            new_R = torch.where(falls_RB[:, j], 0.0, old_R)
            error_RB[:, j] = (old_R - new_R) / upper_BB[j, j]
            part_RB[:, j:] -= error_RB[:, j : j + 1] @ upper_BB[j : j + 1, j:]
            part_RB[:, j] = new_R
        weight_RC[:, start:stop] = part_RB
        weight_RC[:, stop:] -= error_RB @ upper_CC[start:stop, stop:]
    return weight_RC


def alps(weight_RC: torch.Tensor, hessian: Hessian, sparsity: float) -> torch.Tensor:
    """Returns the new weights (R, C): ADMM over masks and weights, then ten steps of conjugate gradients."""
    hessian_CC = hessian.mean_CC.clone()
    hessian_CC.diagonal().add_(DAMPENING * hessian_CC.diagonal().mean())
    scale_C = hessian_CC.diagonal().sqrt()
    hessian_CC = hessian_CC / scale_C / scale_C[:, None]
    values_C, vectors_CC = torch.linalg.eigh(hessian_CC)
    target_RC = weight_RC * scale_C
    kept_RC = _largest(target_RC, sparsity)
    sparse_RC, dual_RC, last = target_RC * kept_RC, torch.zeros_like(target_RC), 1.0
    for iteration in range(ITERATIONS):
        rho = PENALTIES[0] * (PENALTIES[1] / PENALTIES[0]) ** (iteration // 2 / (ITERATIONS // 2 - 1))
        dual_RC, last = dual_RC * (last / rho), rho
        change_RC = rho * (sparse_RC - target_RC - dual_RC)
        solved_RC = target_RC + (change_RC @ vectors_CC / (values_C + rho)) @ vectors_CC.t()
        total_RC = RELAXATION * solved_RC + (1 - RELAXATION) * sparse_RC + dual_RC
        kept_RC = _largest(total_RC, sparsity)
        sparse_RC, dual_RC = total_RC * kept_RC, total_RC * ~kept_RC
    residual_RC = (target_RC - sparse_RC) @ hessian_CC * kept_RC
    direction_RC, square_R1 = residual_RC, residual_RC.square().sum(1, keepdim=True)
    for _ in range(10):
        product_RC = direction_RC @ hessian_CC * kept_RC
        step_R1 = square_R1 / (direction_RC * product_RC).sum(1, keepdim=True)
        sparse_RC, residual_RC = sparse_RC + step_R1 * direction_RC, residual_RC - step_R1 * product_RC
        before_R1, square_R1 = square_R1, residual_RC.square().sum(1, keepdim=True)
        direction_RC = residual_RC + square_R1 / before_R1 * direction_RC
    return sparse_RC / scale_C


def _largest(weight_RC: torch.Tensor, sparsity: float) -> torch.Tensor:
    cut = weight_RC.abs().flatten().sort()[0][round(sparsity * weight_RC.numel()) - 1]
    return weight_RC.abs() > cut


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    phases: Phases,
    solves: bool,
    by_wanda: bool,
    of_four: bool,
    alternates: bool = False,
    sparsity: float = 0.5,
) -> None:
    """Prunes `model` in place, block by block: every batch through the block with hooks on all of its layers, then
    prune, then every batch through it again.

    Args:
        phases: records the begin and end of "statistics" and "solve".
        solves: whether SparseGPT updates the remaining weights.
        by_wanda: whether Wanda selects the pruned weights.
        of_four: prune two of every four weights, instead of a fraction of each row or block.
        alternates: whether ALPS selects and updates, and not SparseGPT.
    """
    hidden, rest = _first_inputs(model, batches)
    for block in model.model.layers:
        layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        kind = Hessian if solves else Norms
        stats = {name: kind(module.in_features) for name, module in layers.items()}

        def add(module, args, output, stat):
            with phases.phase("statistics"):
                stat.add(args[0])

        handles = [
            module.register_forward_hook(lambda *call, stat=stats[name]: add(*call, stat=stat))
            for name, module in layers.items()
        ]
        for x, others in zip(hidden, rest, strict=True):
            _output(block(x, **others))
        for handle in handles:
            handle.remove()
        with phases.phase("solve"):
            for name, module in layers.items():
                weight, mask = module.weight.data, None
                if by_wanda:
                    mask = wanda_mask(weight, stats[name].norms_C, sparsity, of_four)
                if alternates:
                    module.weight.data = alps(weight, stats[name], sparsity)
                elif solves:
                    module.weight.data = sparsegpt(weight, stats[name], sparsity, of_four, mask)
                else:
                    weight[~mask] = 0
        hidden = [_output(block(x, **others)) for x, others in zip(hidden, rest, strict=True)]


def _first_inputs(model: nn.Module, batches) -> tuple[list[torch.Tensor], list[dict]]:
    """Returns the arguments of the first block for each batch."""
    hidden, rest = [], []

    def take(module, args, kwargs):
        hidden.append(args[0])
        rest.append(kwargs)
        raise _Stop

    handle = model.model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except _Stop:
            pass
    handle.remove()
    return hidden, rest


def _output(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
