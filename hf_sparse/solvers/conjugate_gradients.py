"""Least squares over kept weights by conjugate gradients, for all rows of a weight at once.

Shapes: R rows, C inputs.
"""

from __future__ import annotations

import torch


TOLERANCE = 1e-6


def solve_kept(
    gram_CC: torch.Tensor,
    weight_RC: torch.Tensor,
    start_RC: torch.Tensor,
    mask_RC: torch.Tensor,
    steps: int,
    tolerance: float = TOLERANCE,
) -> torch.Tensor:
    """Returns the weights of least squared error among those that are zero where the mask is False:

        X = argmin tr((W - X)·G·(W - X)^T),    X_rc = 0 where the mask is False

    Each row is a system of its own over its kept weights. A step is one product with G for all rows. No step raises
    the error of a row, up to rounding. With a G of unit diagonal, the steps are those of conjugate gradients with the
    Jacobi preconditioner for the G before it was scaled.

    Args:
        gram_CC: G, positive semidefinite.
        weight_RC: W.
        start_RC: the weights to start from, zero where the mask is False.
        mask_RC: bool, True is kept.
        steps: the most steps.
        tolerance: a row takes no more steps once ‖((W - X)·G)_kept‖ <= tolerance·‖(W·G)_kept‖.

    Example:
        >>> gram, weight = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[2.0, 3.0]])
        >>> solve_kept(gram, weight, torch.tensor([[0.0, 3.0]]), torch.tensor([[False, True]]), steps=1)
        tensor([[0., 4.]])

    Reference: Hestenes & Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.
    """
    solution_RC = start_RC.clone()
    limit_R = tolerance**2 * (weight_RC @ gram_CC).mul_(mask_RC).square_().sum(1)
    residual_RC = ((weight_RC - solution_RC) @ gram_CC).mul_(mask_RC)
    direction_RC = residual_RC.clone()
    square_R = residual_RC.square().sum(1)
    for _ in range(steps):
        solved_R = square_R <= limit_R
        if bool(solved_R.all()):
            break
        product_RC = (direction_RC @ gram_CC).mul_(mask_RC)
        step_R1 = _ratio(square_R, (direction_RC * product_RC).sum(1)).masked_fill_(solved_R[:, None], 0.0)
        solution_RC.addcmul_(step_R1, direction_RC)
        residual_RC.addcmul_(step_R1, product_RC, value=-1)
        previous_R, square_R = square_R, residual_RC.square().sum(1)
        direction_RC.mul_(_ratio(square_R, previous_R)).add_(residual_RC)
    return solution_RC


def _ratio(numerator_R: torch.Tensor, denominator_R: torch.Tensor) -> torch.Tensor:
    """The quotients as a column, 0 where there is no positive denominator."""
    return torch.where(denominator_R > 0, numerator_R / denominator_R, 0.0)[:, None]
