"""The units that a solver selects itself, from scores of the weights that it computes while it solves.

Shapes: R rows, C columns of a weight or of a part of it; U is the shape of its units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..numerics import prefers_numpy
from ..patterns import Pattern
from ..selection.budgets import largest_remainder
from ..selection.row_masks import keep_mask_by_row
from ..selection.scores import TensorScores
from ..selection.threshold import find_threshold
from .base import PruneRequest


def check_request(request: PruneRequest, solver: str, scopes: Sequence[str], inputs: int) -> None:
    """Checks a request for a solver that selects units.

    Args:
        request: to be checked.
        solver, scopes: the registered name of the solver, and `Solver.scopes`.
        inputs: the size of the Gram matrix.

    Raises:
        ValueError: the Gram matrix is of another size, the sparsity is not that of an N:M pattern, or the solver does
            not select by row.
    """
    columns, pattern = request.weight_RC.shape[1], request.pattern
    if inputs != columns:
        raise ValueError(f"the weight has {columns} inputs, but the Gram matrix is of {inputs}")
    if request.by_row and "row" not in scopes:
        raise ValueError(f'solver "{solver}" selects among all units of a weight, and not equally many of each row')
    if pattern is not None and pattern.max_sparsity < 1:
        if abs((request.sparsity or 0.0) - pattern.max_sparsity) > 1e-9:
            raise ValueError(
                f'`solver` "{solver}" always gives sparsity {pattern.max_sparsity:g} with {pattern}, not '
                f"{request.sparsity}"
            )


def mask_of(request: PruneRequest) -> torch.Tensor:
    """Returns the mask of a request, all True if it has none."""
    if request.mask_RC is None:
        return torch.ones(request.weight_RC.shape, dtype=torch.bool, device=request.weight_RC.device)
    return request.mask_RC


def prune_count(request: PruneRequest) -> int | torch.Tensor | None:
    """Returns how many units of a weight are zero in the result: one number, or with `by_row` the number in each row
    of units, int64. Units that the mask prunes count. None where N:M or the mask alone decides."""
    pattern = request.pattern
    if pattern is None or pattern.max_sparsity < 1:
        return None
    rows, columns = request.weight_RC.shape
    shape_U = pattern.unit_shape((rows, 1, columns))
    pruned = torch.zeros(shape_U, dtype=torch.bool)
    if request.mask_RC is not None:
        pruned = pattern.pruned_units(request.mask_RC[:, None, :]).cpu()
    total = max(round((request.sparsity or 0.0) * pruned.numel()), int(pruned.sum()))
    if not request.by_row:
        return total
    by_row, units = pruned.flatten(1).sum(1), pruned[0].numel()
    shares = [total / len(by_row)] * len(by_row)
    return torch.from_numpy(largest_remainder(total, shares, by_row.numpy(), [units] * len(by_row)))


def prune_lowest(
    pattern: Pattern,
    scores_RC: torch.Tensor,
    kept_RC: torch.Tensor,
    count: int | torch.Tensor | None,
    masked: bool,
) -> None:
    """Clears pruned weights in `kept_RC`. Overwrites the scores.

    Args:
        pattern: of the units.
        scores_RC: the scores of the weights, 0 or more.
        kept_RC: bool, the mask before, and the result.
        count: the number of lowest units to prune, in each row of units if it is a tensor, those pruned before
            included; None for all that the pattern does not protect.
        masked: whether some weights may be pruned already.
    """
    scores, kept = scores_RC[:, None, :], kept_RC[:, None, :]
    if count is None:
        if masked:
            scores.masked_fill_(~kept, -torch.inf)
        kept_units = pattern.pool(scores.float()) == torch.inf
    else:
        if masked:
            scores.masked_fill_(~kept, 0.0)
        scores_U = pattern.pool(scores).float()
        if masked:
            scores_U = scores_U.masked_fill(pattern.pruned_units(kept), -torch.inf)
        kept_units = _keep_highest(scores_U.contiguous(), count)
    kept.logical_and_(pattern.expand(kept_units, (kept.shape[0], 1, kept.shape[2])))


def _keep_highest(scores_U: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Returns the mask without the `count` lowest units, of each row if it is a tensor, ties by position."""
    if isinstance(count, torch.Tensor):
        return keep_mask_by_row(scores_U.flatten(1), count).view(scores_U.shape)
    flat = scores_U.view(-1)
    if prefers_numpy(flat.device):
        threshold = find_threshold(TensorScores(scores_U), count)
        return threshold.keep_mask(flat, threshold.num_ties)[0].view(scores_U.shape)
    # Sorting does not wait for the device, as reading a threshold would.
    lowest = flat.sort(stable=True)[1][:count]
    return torch.ones_like(flat, dtype=torch.bool).index_fill_(0, lowest, False).view(scores_U.shape)
