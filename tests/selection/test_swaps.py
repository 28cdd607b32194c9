"""Refining masks by swaps, against loops over all pairs in float64."""

import itertools

import pytest
import torch

from hf_sparse.patterns import get_pattern
from hf_sparse.selection import swaps as module
from hf_sparse.selection.swaps import refine_mask
from hf_sparse.statistics import GramMatrix


UNSTRUCTURED, TWO_OF_FOUR = get_pattern("unstructured"), get_pattern("2:4")


def case(rows, columns, seed=0, tokens=200):
    """A weight, correlated inputs with a mean, and their Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix + 0.5
    gram = GramMatrix(columns)
    gram.observe(x)
    return weight, gram


def wanda(weight, gram, pattern, share=0.5):
    scores = weight.abs() * gram.norms
    if pattern == TWO_OF_FOUR:
        return pattern.pool(scores[:, None])[:, 0] == torch.inf
    pruned = scores.argsort(1)[:, : round(share * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter(1, pruned, False)


def errors(weight, mask, gram):
    """The error of each row, float64."""
    lost = (weight * ~mask).double()
    return ((lost @ gram.matrix().double()) * lost).sum(1)


def best_swap(weight_C, mask_C, gram, group):
    """The mask of a row after each swap that its pattern allows, of which that of least error, and the relative change
    of the error by it."""
    masks = []
    for i, j in itertools.product(range(len(weight_C)), repeat=2):
        if mask_C[i] and not mask_C[j] and (group == 1 or i // group == j // group):
            masks.append(mask_C.clone())
            masks[-1][i], masks[-1][j] = False, True
    found, before = errors(weight_C, torch.stack(masks), gram), errors(weight_C, mask_C[None], gram)
    return masks[int(found.argmin())], float(found.min() / before - 1)


def test_two_weights_that_cancel_are_pruned_together():
    """The last two inputs are equal: pruning weights of 1.5 and -2 costs (1.5 - 2)², pruning one of them and one of
    the others 1.5² + 1²."""
    gram = GramMatrix(4)
    gram.observe(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 1.0]]))
    weight, mask = torch.tensor([[1.0, 1.0, 1.5, -2.0]]), torch.tensor([[True, False, False, True]])
    assert errors(weight, mask, gram).tolist() == [3.25]
    refined = refine_mask(weight, mask, gram, 1, UNSTRUCTURED)
    assert refined.tolist() == [[True, True, False, False]] and errors(weight, refined, gram).tolist() == [0.25]
    assert torch.equal(refine_mask(weight, refined, gram, 9, UNSTRUCTURED), refined)
    assert torch.equal(refine_mask(weight, mask, gram, 0, UNSTRUCTURED), mask)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_OF_FOUR], ids=str)
def test_at_the_end_no_swap_lowers_the_error_of_a_row(pattern, share):
    weight, gram = case(5, 24)
    mask = wanda(weight, gram, pattern, share)
    refined = refine_mask(weight, mask, gram, 1000, pattern)
    assert torch.equal(refined.sum(1), mask.sum(1)) and not torch.equal(refined, mask)
    if pattern == TWO_OF_FOUR:
        assert (refined.view(5, -1, 4).sum(2) == 2).all()
    for row in range(5):
        assert best_swap(weight[row], refined[row], gram, pattern.n_of_m[1])[1] > -2e-6


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_OF_FOUR], ids=str)
def test_one_swap_is_the_best_of_all_when_all_are_candidates(pattern, monkeypatch):
    monkeypatch.setattr(module, "_CANDIDATES", 24)
    weight, gram = case(6, 24, seed=1)
    mask = wanda(weight, gram, pattern)
    refined = refine_mask(weight, mask, gram, 1, pattern)
    for row in range(6):
        expected, change = best_swap(weight[row], mask[row], gram, pattern.n_of_m[1])
        assert torch.equal(refined[row], expected if change < 0 else mask[row])
    assert int((refined != mask).sum()) >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_OF_FOUR], ids=str)
def test_the_error_of_no_row_grows_and_more_swaps_lower_it(pattern, dtype):
    weight, gram = case(16, 64, seed=2)
    weight = weight.to(dtype)
    mask = wanda(weight, gram, pattern)
    before, last = mask.clone(), errors(weight, mask, gram)
    for swaps in (1, 2, 5, 20):
        refined = refine_mask(weight, mask, gram, swaps, pattern)
        now = errors(weight, refined, gram)
        assert refined.dtype == torch.bool and torch.equal(mask, before)
        assert torch.equal(refined.sum(1), mask.sum(1)) and int((mask & ~refined).sum(1).max()) <= swaps
        assert (now <= last).all() and now.sum() < last.sum()
        last = now
    assert last.sum() < 0.8 * errors(weight, mask, gram).sum()


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_OF_FOUR], ids=str)
def test_order_and_chunks_of_rows_and_order_of_inputs_change_nothing(pattern, monkeypatch):
    weight, gram = case(12, 32, seed=3)
    mask = wanda(weight, gram, pattern)
    expected = refine_mask(weight, mask, gram, 6, pattern)
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(refine_mask(weight[rows], mask[rows], gram, 6, pattern), expected[rows])
    shift = torch.arange(32).roll(8)  # whole groups
    moved = GramMatrix(32)
    moved.total.copy_(gram.matrix()[shift][:, shift])
    assert torch.equal(refine_mask(weight[:, shift], mask[:, shift], moved, 6, pattern), expected[:, shift])
    monkeypatch.setattr(module, "chunk_size", lambda device: 300)
    assert torch.equal(refine_mask(weight, mask, gram, 6, pattern), expected)
    transposed = weight.t().contiguous().t(), mask.t().contiguous().t()
    assert torch.equal(refine_mask(*transposed, gram, 6, pattern), expected)


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, TWO_OF_FOUR], ids=str)
def test_zeros_stay_pruned_and_dead_inputs_are_pruned(pattern):
    weight, gram = case(8, 32, seed=4)
    weight[:, ::5], gram.total[:, 7], gram.total[7] = 0.0, 0.0, 0.0
    mask = wanda(weight, gram, pattern) & (weight != 0)
    mask[:, 6], mask[:, 7] = False, True
    refined = refine_mask(weight, mask, gram, 100, pattern)
    assert not refined[weight == 0].any() and torch.equal(refined.sum(1), mask.sum(1))
    assert not refined[:, 7].all()  # its weights have no effect


def test_rows_and_weights_without_a_swap():
    weight, gram = case(3, 8)
    for mask in (torch.ones(3, 8, dtype=torch.bool), torch.zeros(3, 8, dtype=torch.bool)):
        for pattern in (UNSTRUCTURED, TWO_OF_FOUR):
            assert torch.equal(refine_mask(weight, mask, gram, 5, pattern), mask)
    assert refine_mask(weight[:0], mask[:0], gram, 5, UNSTRUCTURED).shape == (0, 8)
    one = GramMatrix(1)
    one.observe(torch.ones(2, 1))
    assert refine_mask(weight[:, :1], mask[:, :1], one, 5, UNSTRUCTURED).shape == (3, 1)


def test_what_is_refused():
    weight, gram = case(4, 8)
    mask = torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match='pattern "4x1" cannot be refined by swaps'):
        refine_mask(weight, mask, gram, 1, get_pattern("4x1"))
    with pytest.raises(ValueError, match="the weight has 4 inputs, but the Gram matrix is of 8"):
        refine_mask(weight[:, :4], mask[:, :4], gram, 1, UNSTRUCTURED)
