"""Masks that prune the lowest units of every row.

Shapes: R rows, U units of a row.
"""

from __future__ import annotations

import torch

from ..kernels import has_kernels
from ..numerics import chunk_size, prefers_numpy


_NAN = (
    "scores must not be NaN, but a row has some: check the weights, gradients or activations that they are computed "
    "from"
)


def keep_mask_by_row(scores_RU: torch.Tensor, k_R: torch.Tensor | int) -> torch.Tensor:
    """Returns the mask that prunes exactly the k lowest units of each row, the first by position of equal ones.

    Args:
        scores_RU: (R, U) scores.
        k_R: (R) number of units to prune of each row, or one number for all rows.

    Returns:
        (R, U) bool, True is kept.

    Raises:
        ValueError: a k is not from 0 to U, or a score is NaN.

    Example:
        >>> keep_mask_by_row(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]), 1)
        tensor([[ True, False,  True],
                [False,  True,  True]])
    """
    rows, units = scores_RU.shape
    k_R = torch.as_tensor(k_R).expand(rows)  # checked where it is: on the CPU that waits for no device
    if rows and not (0 <= int(k_R.min()) and int(k_R.max()) <= units):
        raise ValueError(f"k must be in 0..{units}, the units of a row, but is {int(k_R.min())}..{int(k_R.max())}")
    k_R = k_R.to(scores_RU.device)
    if rows and has_kernels(scores_RU.device):
        from ..kernels import rows as kernel

        if 0 < units <= kernel.MAX_UNITS:
            scores = scores_RU.detach().float().contiguous()
            keep_RU, has_nan = kernel.keep_mask_by_row(scores, k_R.contiguous())
            if has_nan:
                raise ValueError(_NAN)
            return keep_RU
    keep_RU = torch.empty(rows, units, dtype=torch.bool, device=scores_RU.device)
    step = max(1, chunk_size(scores_RU.device) // max(1, units))
    for start in range(0, rows if units else 0, step):
        scores, k = scores_RU[start : start + step].detach().float(), k_R[start : start + step]
        if torch.isnan(scores.amax()):
            raise ValueError(_NAN)
        value = _kth_values(scores, k)[:, None]
        kept = torch.gt(scores, value, out=keep_RU[start : start + step])
        num_ties_kept = units - k - kept.sum(1)  # of the units equal to the value, the last ones by position
        rows_with_ties = num_ties_kept.nonzero()[:, 0]  # usually none
        if len(rows_with_ties):
            equal = scores[rows_with_ties] == value[rows_with_ties]
            num_ties_pruned = equal.sum(1) - num_ties_kept[rows_with_ties]
            kept[rows_with_ties] |= equal & (equal.cumsum(1) > num_ties_pruned[:, None])
    return keep_RU


def _kth_values(scores_RU: torch.Tensor, k_R: torch.Tensor) -> torch.Tensor:
    """Returns the k-th lowest score (R) of each row, the lowest one for k = 0."""
    index_R = (k_R - 1).clamp(min=0)
    distinct = index_R.unique()
    if len(distinct) > 8 and scores_RU.device.type != "cpu":
        return scores_RU.sort(1)[0].gather(1, index_R[:, None])[:, 0]
    values_R = scores_RU.new_empty(len(scores_RU))
    for index in distinct.tolist():
        rows = (index_R == index).nonzero()[:, 0]
        part = scores_RU[rows]
        if prefers_numpy(part.device):
            part.numpy().partition(index, axis=1)
            values_R[rows] = part[:, index]
        else:
            values_R[rows] = part.kthvalue(index + 1, 1)[0]
    return values_R
