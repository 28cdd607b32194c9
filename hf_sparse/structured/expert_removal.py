"""Removes experts that the caller names.

Zeros cannot say it: an expert that is zero still gets a share of the router's softmax, a removed one does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..model.blocks import is_within
from .config_fields import Stack, find_stack
from .plan import SizeChange
from .reduction import Reduction, ShrinkError


ExpertsToKeep = Sequence[int] | Mapping[int, Sequence[int]]


def remove_experts(reduction: Reduction, experts: ExpertsToKeep | None) -> None:
    """Keeps only the experts that the caller names, with their rows of the router.

    Args:
        reduction: of the model.
        experts: numbers of the experts to keep in every block, or a mapping from the number of a block to them.

    Raises:
        ShrinkError: `experts` is not valid.
    """
    if experts is None:
        return
    fused = {
        layer.module: layer.num_matrices
        for layer in reduction.layers
        if layer.expert_dim == 0 and not reduction.is_removed(layer.name)
    }
    stacks = {module: find_stack(reduction.model, module) for module in fused}
    numbers_kept = set()
    for module, before in fused.items():
        stack = stacks[module]
        if stack is None or stack.fields.experts is None:
            break
        kept = _kept_experts(reduction, module, experts, before, stack)
        numbers_kept.add(len(kept))
        if len(numbers_kept) > 1:
            raise ShrinkError("`experts` must keep the same number in every block: the config has one number for all.")
        if len(kept) < before:
            _keep_experts(reduction, module, kept, before)
            setattr(stack.section(reduction.config), stack.fields.experts, len(kept))
            change = SizeChange(stack.fields.experts, before, len(kept), "with the rows of the router")
            reduction.changes += [change] if change not in reduction.changes else []
    if not numbers_kept:
        raise ShrinkError(
            f"`experts` is {experts}, but no field of the config of {type(reduction.model).__name__} is known to be "
            "their number."
        )


def _kept_experts(
    reduction: Reduction, module: str, experts: ExpertsToKeep, before: int, stack: Stack
) -> tuple[int, ...]:
    """Returns the experts of one module that stay, after checking them."""
    if isinstance(experts, Mapping):
        blocks = [block for blocks in reduction.block_lists.values() for block in blocks]
        number = int(next(block for block in blocks if is_within(module, block)).rpartition(".")[2])
        if number not in experts:
            raise ShrinkError(
                f"`experts` has no entry for block {number}: it must have one for each block with experts."
            )
        experts = experts[number]
    kept = tuple(experts)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= before:
        raise ShrinkError(
            f'`experts` is {list(kept)} for "{module}": it must list the experts to keep in increasing order, from 0 '
            f"to {before - 1}."
        )
    per_token = getattr(stack.section(reduction.config), "num_experts_per_tok", 1)
    if len(kept) < per_token:
        raise ShrinkError(f"`experts` keeps {len(kept)}, but {per_token} compute each token: keep at least as many.")
    return kept


def _keep_experts(reduction: Reduction, module: str, kept: tuple[int, ...], before: int) -> None:
    """Removes experts from their own parameters, and from those of the router, which is beside them."""
    around = module.rpartition(".")[0]
    reduction.experts[around] = kept
    for name, tensor in [*reduction.parameters.items(), *reduction.model.named_buffers()]:
        if is_within(name, around) and tensor.ndim and tensor.shape[0] == before:
            reduction.entries.keep_experts(name, torch.tensor(kept))
