"""oBERT and M-FAC against dense float64 inverses and Optimal Brain Surgeon by its definition.

Shapes: M gradients, B inputs of a block, Q weights of a unit.
"""

import itertools

import numpy as np
import pytest
import torch

from hf_sparse.criteria import CRITERIA
from hf_sparse.criteria.mfac import LEAST_DAMPENING, MFAC
from hf_sparse.criteria.obert import OBert


BOTH = pytest.mark.parametrize("cls", [OBert, MFAC])


def row(size, num_gradients=9, seed=0):
    """A weight (1, 1, size) and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 1, size, generator=generator)
    return weight, [torch.randn(1, 1, size, generator=generator) for _ in range(num_gradients)]


def fisher(gradients, columns, dampening, kept=None):
    """F of the inputs `columns`: pruned weights are independent of the others."""
    rows = np.stack([np.asarray(gradient, dtype=np.float64).reshape(-1)[columns] for gradient in gradients])
    if kept is not None:
        rows = rows * kept
    matrix = rows.T @ rows
    count = rows.shape[1] if kept is None else kept.sum()
    return matrix + dampening * np.trace(matrix) / count * np.eye(len(matrix))


def inverse_by_sherman_morrison(gradients, columns, dampening):
    """F⁻¹ by the recursion of the paper, one gradient after the other."""
    rows = [np.asarray(gradient, dtype=np.float64).reshape(-1)[columns] for gradient in gradients]
    size = len(rows[0])
    inverse = np.eye(size) / (dampening * sum((g**2).sum() for g in rows) / size)
    for g in rows:
        moved = inverse @ g
        inverse -= np.outer(moved, moved) / (1 + g @ moved)
    return inverse


def least_rise(matrix, w, pruned):
    """The least ΔwᵀFΔw/2 with Δw = -w where `pruned`, and that Δw, by elimination."""
    pruned, left = np.flatnonzero(pruned), np.flatnonzero(~np.asarray(pruned))
    change = np.zeros(len(w))
    change[pruned] = -w[pruned]
    change[left] = np.linalg.lstsq(matrix[np.ix_(left, left)], matrix[np.ix_(left, pruned)] @ w[pruned], rcond=None)[0]
    return change @ matrix @ change / 2, change


@BOTH
@pytest.mark.parametrize("dampening", [1e-2, 1e-6])
def test_scores_are_those_of_the_inverse_by_sherman_morrison(cls, dampening):
    weight, gradients = row(10)
    criterion = cls(block_size=5, dampening=dampening)
    scores = criterion.weight_scores(weight, weight != 0, gradients, block=5, width=1)
    for columns in (range(5), range(5, 10)):
        columns = list(columns)
        inverse = inverse_by_sherman_morrison(gradients, columns, dampening)
        assert np.allclose(inverse, np.linalg.inv(fisher(gradients, columns, dampening)), rtol=1e-6)
        w = weight.double().numpy().reshape(-1)[columns]
        assert np.allclose(scores.reshape(-1)[columns], w**2 / (2 * np.diag(inverse)), rtol=1e-4)


@BOTH
@pytest.mark.parametrize(("width", "block"), [(1, 6), (2, 6), (3, 6), (6, 6)])
def test_the_score_of_a_unit_is_the_least_rise_of_the_quadratic_model(cls, width, block):
    weight, gradients = row(6)
    criterion = cls(dampening=1e-3)
    scores = criterion.weight_scores(weight, weight != 0, gradients, block, width).reshape(-1)
    w, matrix = weight.double().numpy().reshape(-1), fisher(gradients, slice(0, 6), 1e-3)
    for first in range(0, 6, width):
        pruned = np.isin(np.arange(6), range(first, first + width))
        assert float(scores[first : first + width].sum()) == pytest.approx(least_rise(matrix, w, pruned)[0], rel=1e-4)


@BOTH
def test_the_update_is_the_minimum_for_every_set_of_pruned_weights(cls):
    weight, gradients = row(5)
    criterion, w, matrix = (
        cls(dampening=1e-3),
        weight.double().numpy().reshape(-1),
        fisher(gradients, slice(0, 5), 1e-3),
    )
    for kept in itertools.product([True, False], repeat=5):
        pruned = ~np.array(kept)
        mask = torch.tensor(kept).view(1, 1, 5)
        change = criterion.weight_change(weight, weight != 0, mask, gradients, 5).double().numpy().reshape(-1)
        least, expected = least_rise(matrix, w, pruned)
        assert not change[pruned].any() and np.allclose(change[~pruned], expected[~pruned], rtol=1e-4, atol=1e-6)
        whole = np.where(pruned, -w, change)
        assert whole @ matrix @ whole / 2 == pytest.approx(least, rel=1e-6)
        without = np.where(pruned, -w, 0)
        assert least <= without @ matrix @ without / 2 + 1e-12


@BOTH
def test_what_was_pruned_before_neither_scores_nor_changes_nor_has_influence(cls):
    weight, gradients = row(6)
    criterion, before = cls(dampening=1e-3), torch.tensor([True, False, True, True, False, True]).view(1, 1, 6)
    scores = criterion.weight_scores(weight, before, gradients, 6, 1).reshape(-1)
    live = np.flatnonzero(before.reshape(-1))
    matrix, w = fisher(gradients, live, 1e-3), weight.double().numpy().reshape(-1)[live]
    assert np.allclose(scores[live], w**2 / (2 * np.diag(np.linalg.inv(matrix))), rtol=1e-4)
    assert not scores[~before.reshape(-1)].any()
    after = before & (torch.arange(6) != 2)
    change = criterion.weight_change(weight, before, after, gradients, 6).reshape(-1)
    expected = least_rise(matrix, w, np.array([False, True, False, False]))[1]
    assert np.allclose(change[live[[0, 2, 3]]], expected[[0, 2, 3]], rtol=1e-4) and not change[[1, 2, 4]].any()
    regrown = torch.ones(1, 1, 6, dtype=torch.bool)
    assert not criterion.weight_change(weight, before, regrown, gradients, 6).any()


@BOTH
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_the_scale_of_all_gradients_scales_scores_and_leaves_the_update(cls, factor):
    weight, gradients = row(12)
    scaled, criterion = [gradient * factor for gradient in gradients], cls()
    kept, mask = weight != 0, torch.arange(12).view(1, 1, 12) % 3 > 0
    assert torch.equal(
        criterion.weight_scores(weight, kept, scaled, 6, 1),
        criterion.weight_scores(weight, kept, gradients, 6, 1) * factor**2,
    )
    assert torch.equal(
        criterion.weight_change(weight, kept, mask, scaled, 6),
        criterion.weight_change(weight, kept, mask, gradients, 6),
    )


@BOTH
def test_weights_without_a_gradient_score_0_and_stay(cls):
    """As those that the loss does not depend on."""
    weight, mask = torch.ones(2, 1, 4), torch.arange(4) > 1
    assert not cls().weight_scores(weight, weight != 0, [], 4, 1).any()
    assert not cls().weight_change(weight, weight != 0, mask.expand(2, 1, 4), [], 4).any()


@BOTH
def test_blocks_without_gradients_score_0_and_stay(cls):
    weight, gradients = row(8)
    for gradient in gradients:
        gradient[..., :4] = 0
    criterion, mask = cls(), torch.arange(8).view(1, 1, 8) % 4 > 0
    scores = criterion.weight_scores(weight, weight != 0, gradients, 4, 1).reshape(-1)
    change = criterion.weight_change(weight, weight != 0, mask, gradients, 4).reshape(-1)
    assert not scores[:4].any() and bool((scores[4:] > 0).all()) and not change[:4].any() and bool(change[5:].all())


@BOTH
def test_equal_gradients_with_the_least_damping_stay_finite(cls):
    """F has rank 1, and the damping is below the rounding of its sums, or the least that is allowed."""
    weight, gradients = row(48, num_gradients=1)
    criterion = cls(dampening=LEAST_DAMPENING if cls is MFAC else 1e-12)
    scores = criterion.weight_scores(weight, weight != 0, gradients * 64, 48, 1)
    change = criterion.weight_change(weight, weight != 0, weight > 0, gradients * 64, 48)
    assert bool(torch.isfinite(scores).all()) and bool(torch.isfinite(change).all())


@BOTH
@pytest.mark.parametrize("positions", [1, 3])
def test_rows_are_independent_whatever_is_computed_together(cls, positions):
    """In several steps: room for 512 gradients is made."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(70, positions, 20, generator=generator)
    gradients = [torch.randn(70, positions, 20, generator=generator).bfloat16() for _ in range(8)]
    criterion, mask = cls(block_size=8, num_gradients=512), weight > 0
    kept = torch.rand(weight.shape, generator=generator) > 0.2
    scores = criterion.weight_scores(weight, kept, gradients, 7, 1)
    change = criterion.weight_change(weight, kept, mask, gradients, 7)
    for rows in (slice(0, 1), slice(13, 50), slice(69, 70)):
        part = [gradient[rows] for gradient in gradients]
        assert torch.equal(criterion.weight_scores(weight[rows], kept[rows], part, 7, 1), scores[rows])
        assert torch.equal(criterion.weight_change(weight[rows], kept[rows], mask[rows], part, 7), change[rows])


@pytest.mark.parametrize("width", [1, 4, 32])
@pytest.mark.parametrize("num_gradients", [1, 8, 100])
def test_the_same_blocks_give_the_same_scores_and_updates(num_gradients, width):
    """With fewer and more gradients than inputs of a block, after half of the weights were pruned."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(30, 1, 70, generator=generator)
    gradients = [torch.randn(weight.shape, generator=generator).bfloat16() for _ in range(num_gradients)]
    before = torch.rand(weight.shape, generator=generator) > 0.5
    after = before & (torch.rand(weight.shape, generator=generator) > 0.5)
    found = []
    for criterion in (OBert(block_size=32, dampening=0.1), MFAC(block_size=32, dampening=0.1)):
        block = criterion.block_columns(70, width)
        scores = criterion.weight_scores(weight, before, gradients, block, width)
        found.append((scores, criterion.weight_change(weight, before, after, gradients, block)))
    for expected, other in zip(*found, strict=True):
        assert bool(expected.any()) and torch.allclose(other, expected, rtol=1e-4, atol=1e-6)


def test_a_row_is_a_block_of_mfac():
    """Scores of F = λ + Gᵀ·G for 200 inputs, from 3 gradients, with the least damping: far from that of 0."""
    weight, gradients = row(200, num_gradients=3)
    for dampening in (1.0, LEAST_DAMPENING):
        criterion = MFAC(dampening=dampening)
        block = criterion.block_columns(200, 1)
        inverse = np.linalg.inv(fisher(gradients, slice(0, 200), dampening))
        scores = criterion.weight_scores(weight, weight != 0, gradients, block, 1).reshape(-1)
        w = weight.double().numpy().reshape(-1)
        assert block == 200 and np.allclose(scores, w**2 / (2 * np.diag(inverse)), rtol=1e-4, atol=0)


def test_scores_are_exact_with_the_least_damping_and_more_gradients_than_weights():
    """Where F has no direction without a gradient, 1 - gᵀ·K⁻¹·g is near 0."""
    weight, gradients = row(20, num_gradients=40)
    scores = MFAC(dampening=LEAST_DAMPENING).weight_scores(weight, weight != 0, gradients, 20, 1).reshape(-1)
    inverse, w = np.linalg.inv(fisher(gradients, slice(0, 20), LEAST_DAMPENING)), weight.double().numpy().reshape(-1)
    assert np.allclose(scores, w**2 / (2 * np.diag(inverse)), rtol=1e-4, atol=0)


def test_sizes_of_blocks():
    obert = OBert(block_size=50)
    assert [obert.block_columns(columns, 1) for columns in (30, 50, 51, 384, 768)] == [30, 50, 26, 48, 48]
    assert obert.block_columns(51, 3) == 27 and obert.block_columns(384, 64) == 64
    assert obert.block_columns(384, 384) == 48  # units that are rows
    assert [MFAC().block_columns(columns, width) for columns, width in ((30, 1), (384, 4), (384, 384))] == [
        30,
        384,
        384,
    ]
    assert MFAC(block_size=512).block_columns(3072, 1) == 512


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("obert", {"block_size": None}, "block_size"),
        ("mfac", {"dampening": 1e-12}, '"dampening" is 1e-12: it must be at least 1e-08, as in 1.0'),
        ("obert", {"block_size": 0}, '"block_size" is 0: it must be at least 1'),
        ("mfac", {"num_gradients": 0}, '"num_gradients" is 0: it must be at least 1'),
        ("mfac", {"dampening": 0.0}, '"dampening" is 0.0: it must be above 0'),
        ("obert", {"dtype": "float16"}, '"dtype" is "float16": it must be bfloat16 or float32'),
    ],
)
def test_invalid_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        CRITERIA.create(name, options)
