"""Least squares against float64 closed forms over all tokens."""

import pytest
import torch

from hf_sparse.solvers import SOLVERS
from hf_sparse.solvers.lstsq import LeastSquares
from hf_sparse.statistics import GramMatrix, WeightedGram


ROWS, COLUMNS, TOKENS = 4, 12, 90


def layer(seed=0, dtype=torch.float64):
    """Inputs that depend on each other and have means, a weight and a bias."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=dtype)
    x = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=dtype) @ mix + mix[0]
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=dtype)
    return x, weight, torch.randn(ROWS, generator=generator, dtype=dtype)


def column_mask(pruned=(1, 4, 5, 9, 11)):
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    mask[:, list(pruned)] = False
    return mask


def ridge_regression(x, y, old, share, a):
    """Minimizes Σ a ‖y - W x‖² + share · mean diag(X^T a X) · ‖W - old‖² in one augmented least squares problem."""
    d = share * (a[:, None] * x.square()).sum(0).mean()
    left = torch.cat([a.sqrt()[:, None] * x, d.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    right = torch.cat([a.sqrt()[:, None] * y, d.sqrt() * old.t()])
    return torch.linalg.lstsq(left, right).solution.t()


@pytest.mark.parametrize("ridge", [0, 0.01, 0.5])
def test_kept_columns_are_the_ridge_regression_towards_the_old_weights(ridge):
    x, weight, _ = layer()
    mask, gram = column_mask(), GramMatrix(COLUMNS)
    gram.observe(x)
    solved, kept = LeastSquares(ridge).solve(weight.float(), gram, mask_RC=mask)
    columns = mask[0]
    expected = ridge_regression(x[:, columns], x @ weight.t(), weight[:, columns], ridge, torch.ones(len(x)).double())
    assert torch.equal(kept, mask) and not solved[:, ~columns].any()
    assert torch.allclose(solved[:, columns].double(), expected, rtol=1e-3, atol=1e-3)


def test_the_bias_takes_its_best_value_and_tokens_count_by_their_output():
    x, weight, bias = layer(seed=1)
    y, mask, gram = x @ weight.t() + bias, column_mask(), WeightedGram(COLUMNS)
    gram.observe_outputs(x, y)
    with_bias = torch.cat([weight, bias[:, None]], 1)
    solved, _ = LeastSquares(0.01).solve(
        with_bias.float(), gram, mask_RC=torch.cat([mask, torch.ones(ROWS, 1, dtype=torch.bool)], 1)
    )
    a, columns = 1 / y.square().sum(1), mask[0]
    mean_x, mean_y = ((a[:, None] * values).sum(0) / a.sum() for values in (x, y))
    kept = (x - mean_x)[:, columns]
    expected = ridge_regression(kept, y - mean_y, weight[:, columns], 0.01, a)
    assert torch.allclose(solved[:, :-1][:, columns].double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(solved[:, -1].double(), mean_y - expected @ mean_x[columns], rtol=1e-3, atol=1e-3)
    assert not solved[:, :-1][:, ~columns].any()


def test_without_a_bias_the_weighted_inputs_are_not_centered():
    x, weight, _ = layer(seed=2)
    y, mask, gram = x @ weight.t(), column_mask(), WeightedGram(COLUMNS)
    gram.observe_outputs(x, y)
    solved, _ = LeastSquares(0.01).solve(weight.float(), gram, mask_RC=mask)
    columns = mask[0]
    expected = ridge_regression(x[:, columns], y, weight[:, columns], 0.01, 1 / y.square().sum(1))
    assert torch.allclose(solved[:, columns].double(), expected, rtol=1e-3, atol=1e-3)


def test_columns_that_others_repeat_cost_nothing():
    x, weight, bias = layer(seed=3, dtype=torch.float32)
    x[:, 4] = 2 * x[:, 0] - x[:, 2] + 3  # the constant can only be in the bias
    y, gram, mask = x @ weight.t() + bias, WeightedGram(COLUMNS), column_mask([4])
    gram.observe_outputs(x, y)
    mask = torch.cat([mask, torch.ones(ROWS, 1, dtype=torch.bool)], 1)
    solved, _ = LeastSquares(1e-6).solve(torch.cat([weight, bias[:, None]], 1), gram, mask_RC=mask)
    assert torch.allclose(x @ solved[:, :-1].t() + solved[:, -1], y, rtol=1e-3, atol=1e-2)


def test_rows_with_masks_of_their_own_are_solved_one_by_one():
    x, weight, _ = layer(seed=4)
    mask, gram = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) < 0.6, GramMatrix(COLUMNS)
    gram.observe(x)
    solved, _ = LeastSquares().solve(weight.float(), gram, mask_RC=mask)
    for row in range(ROWS):
        alone, _ = LeastSquares().solve(weight[row : row + 1].float(), gram, mask_RC=mask[row : row + 1])
        assert torch.allclose(solved[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_options_and_sizes_that_cannot_be():
    with pytest.raises(ValueError, match='"ridge" is 2: it must be from 0 to 1'):
        SOLVERS.create("lstsq", {"ridge": 2})
    assert LeastSquares(0).needs_full_rank and not LeastSquares().needs_full_rank
    gram = WeightedGram(COLUMNS)
    with pytest.raises(ValueError, match="the weight has 9 inputs, but the Gram matrix is of 12"):
        LeastSquares().solve(torch.ones(2, 9), gram, mask_RC=torch.ones(2, 9, dtype=torch.bool))
