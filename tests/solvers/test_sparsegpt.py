"""SparseGPT against its definition, written out naively in float64: at each column, from the first, the inverse of the
remaining part of the matrix."""

import pytest
import torch

from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import HessianFactor, PruneRequest, output_energy, sparsegpt
from hf_sparse.solvers.none import NoUpdate
from hf_sparse.solvers.sparsegpt import SparseGPT
from hf_sparse.statistics import GramMatrix


SELECTIONS = [("unstructured", 0.5), ("unstructured", 0.25), ("2:4", 0.5), ("1:4", 0.75), ("4x1", 0.5), ("2x2", 0.25)]
SELECTIONS += [("1x4", 0.5), ("channel:in", 0.5)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(columns, tokens=300, seed=1):
    x = random(tokens, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return x.t() @ x


def solver(block=128):
    return SparseGPT(block_size=block)


def random_mask(*shape, share=0.5, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


def eliminate(weight, gram, select, block):
    """The paper's definition. select(first, scores of the block's columns) -> which are kept, (R, width), or None."""
    weight, columns = weight.clone(), len(gram)
    kept = torch.ones_like(weight, dtype=torch.bool)
    importance = torch.stack([1 / torch.linalg.inv(gram[j:, j:])[0, 0] for j in range(columns)])
    for j in range(columns):
        if j % block == 0:
            columns_of_block = slice(j, j + block)
            scores = (weight[:, columns_of_block] ** 2 * importance[columns_of_block]).float()
            kept[:, columns_of_block] = select(j, scores)
        inverse = torch.linalg.inv(gram[j:, j:])
        error = torch.where(kept[:, j], 0.0, weight[:, j]) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
        weight[~kept[:, j], j] = 0.0
    return weight, kept


def error_of(change, gram):
    return torch.einsum("rc,cd,rd->r", change, gram, change)


@pytest.mark.parametrize("block", [1, 3, 16, 128])
@pytest.mark.parametrize("columns", [1, 7, 48])
def test_with_a_given_mask_it_is_the_definition(columns, block):
    weight, gram, mask = random(11, columns), correlated(columns), random_mask(11, columns)
    solved, kept = solver(block).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    expected, _ = eliminate(weight, gram, lambda j, scores: mask[:, j : j + 4], 4)
    assert torch.equal(kept, mask) and torch.allclose(solved, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("block", [4, 16, 128])
@pytest.mark.parametrize("text, sparsity", SELECTIONS)
def test_its_own_selection_is_the_definition(text, sparsity, block):
    """Per block of columns over all rows, of N:M per group; scores w²/[inverse of the remaining matrix]_jj."""
    pattern, columns = get_pattern(text), 48
    weight, gram = random(8, columns), correlated(columns)
    solved, kept = solver(block).solve(weight, HessianFactor(gram, 0), pattern, sparsity)

    def select(first, scores):
        if pattern.max_sparsity < 1:
            return pattern.pool(scores[:, None, :])[:, 0] == torch.inf
        units = pattern.pool(scores[:, None, :])
        order = units.flatten().argsort(stable=True)
        keep = torch.ones(units.numel(), dtype=torch.bool)
        keep[order[: round(sparsity * units.numel())]] = False
        return pattern.expand(keep.view(units.shape), (8, 1, scores.shape[1])).expand(8, 1, -1)[:, 0]

    width = pattern.of if pattern.max_sparsity < 1 else min(block, columns)
    expected, mask = eliminate(weight, gram, select, width)
    assert torch.equal(kept, mask)
    assert torch.allclose(solved, expected, rtol=1e-8, atol=1e-9)


def test_one_column_at_the_front_is_the_closed_form():
    """Optimal Brain Surgeon: w - w_0/[H⁻¹]_00·H⁻¹_0, with the error w_0²/[H⁻¹]_00."""
    weight, gram = random(1, 9), correlated(9)
    mask = torch.tensor([[False] + [True] * 8])
    solved, _ = solver(4).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    inverse = torch.linalg.inv(gram)
    assert torch.allclose(solved, weight - weight[0, 0] / inverse[0, 0] * inverse[0], rtol=1e-9, atol=1e-10)
    assert torch.allclose(error_of(solved - weight, gram), weight[0, 0] ** 2 / inverse[0, 0])


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("pruned", [1, 4, 11, 12])
def test_pruned_columns_before_kept_ones_give_the_least_squares_solution(pruned, block):
    """min ‖(w - ŵ)X‖² over the kept weights K, of pruned P: ŵ_K = w_K + w_P·G_PK·G_KK⁻¹."""
    weight, gram = random(5, 12), correlated(12)
    mask = torch.arange(12).expand(5, 12) >= pruned
    solved, _ = solver(block).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    moved = weight[:, :pruned] @ gram[:pruned, pruned:] @ torch.linalg.inv(gram[pruned:, pruned:])
    assert torch.allclose(solved[:, pruned:], weight[:, pruned:] + moved, rtol=1e-8, atol=1e-9)


def test_weights_before_the_first_pruned_column_do_not_change():
    weight, gram = random(4, 20).float(), correlated(20).float()
    mask = torch.arange(20).expand(4, 20) != 13
    solved, _ = solver(8).solve(weight, gram, mask_RC=mask)
    assert torch.equal(solved[:, :13], weight[:, :13]) and (solved[:, 14:] != weight[:, 14:]).all()


def test_the_error_is_the_sum_over_pruned_weights():
    """For each row the sum over its pruned weights of (w_j, updated so far)²/[inverse of the remaining matrix]_jj."""
    weight, gram, mask = random(6, 15), correlated(15), random_mask(6, 15)
    expected, current = torch.zeros(6, dtype=torch.float64), weight.clone()
    for j in range(15):
        inverse = torch.linalg.inv(gram[j:, j:])
        pruned = torch.where(mask[:, j], 0.0, current[:, j])
        expected += pruned**2 / inverse[0, 0]
        current[:, j:] -= pruned[:, None] / inverse[0, 0] * inverse[0]
    solved, _ = solver(4).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    assert torch.allclose(error_of(solved - weight, gram), expected, rtol=1e-8)


@pytest.mark.parametrize("text, sparsity", SELECTIONS)
@pytest.mark.parametrize("kind", ["independent", "correlated", "low rank"])
def test_the_error_is_below_that_of_no_update_with_the_same_mask(kind, text, sparsity):
    """No theorem, because updates go to later columns only; it holds for all of these by far."""
    for seed in range(5):
        x = random(100, 64, seed=10 + seed)
        if kind == "correlated":
            x = x @ random(64, 64, seed=20 + seed)
        if kind == "low rank":
            x = random(200, 16, seed=seed) @ random(16, 64, seed=20 + seed) + 0.1 * random(200, 64, seed=seed)
        gram = GramMatrix(64)
        gram.observe(x)
        weight = random(32, 64, seed=30 + seed).float()
        solved, mask = solver(16).solve(weight, gram, get_pattern(text), sparsity)
        zeroed, _ = NoUpdate().solve(weight, mask_RC=mask)
        error, plain = output_energy(solved - weight, gram), output_energy(zeroed - weight, gram)
        assert error < plain
        magnitude = weight.abs() > weight.abs().flatten().kthvalue(1024)[0]
        solved, _ = solver(16).solve(weight, gram, mask_RC=magnitude)
        zeroed, _ = NoUpdate().solve(weight, mask_RC=magnitude)
        assert output_energy(solved - weight, gram) < output_energy(zeroed - weight, gram)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 0.333, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("rows, columns, block", [(3, 50, 7), (8, 48, 16), (1, 130, 128)])
def test_exactly_the_given_sparsity_is_pruned_spread_over_blocks(rows, columns, block, sparsity):
    gram = correlated(columns).float()
    for weight in (random(rows, columns).float(), torch.ones(rows, columns)):
        _, kept = solver(block).solve(weight, gram, get_pattern("unstructured"), sparsity)
        assert int((~kept).sum()) == round(sparsity * rows * columns)
        for part in kept.split(block, dim=1):
            assert abs(int((~part).sum()) - sparsity * part.numel()) < 1.001


def test_ties_are_pruned_by_position():
    """Constant weights of independent inputs: the first of each block are pruned, row after row."""
    _, kept = solver(4).solve(torch.ones(2, 8), torch.eye(8), get_pattern("unstructured"), 0.75)
    assert ["".join(".#"[kept_one] for kept_one in row) for row in kept.tolist()] == ["........", "..##..##"]
    _, kept = solver(4).solve(torch.ones(2, 8), torch.eye(8), get_pattern("2:4"), 0.5)
    assert ["".join(".#"[kept_one] for kept_one in row) for row in kept.tolist()] == ["..##..##"] * 2


@pytest.mark.parametrize("text, sparsity", SELECTIONS)
def test_zeros_of_the_mask_are_kept_and_counted(text, sparsity):
    pattern, weight, gram = get_pattern(text), random(8, 32), correlated(32)
    locked = random_mask(8, 32, share=0.2)
    if text not in ("unstructured", "2:4", "1:4"):  # whole units, and one that is zero in part
        units = random_mask(*pattern.unit_shape((8, 1, 32)), share=0.1)
        locked = pattern.expand(units, (8, 1, 32)).expand(8, 1, 32)[:, 0].clone()
        locked[0, 0] = False
    weight = weight * locked
    solved, kept = solver(16).solve(weight, HessianFactor(gram, 0), pattern, sparsity, mask_RC=locked)
    assert not (kept & ~locked).any() and not solved[~kept].any()
    units = pattern.pool(kept.float()[:, None, :])
    if pattern.max_sparsity < 1:
        groups, before = kept.view(8, 8, 4).sum(2), locked.view(8, 8, 4).sum(2)
        assert torch.equal(groups, before.clamp(max=pattern.keep))
    else:
        assert int((units == 0).sum()) == round(sparsity * units.numel())
    expected, _ = solver(16).solve(weight, HessianFactor(gram, 0), mask_RC=kept)
    assert torch.allclose(solved, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("text", ["unstructured", "2x2"])
def test_zeros_of_the_mask_are_pruned_before_other_zeros(text):
    """All scores are 0; the mask's zeros are last by position, and are counted."""
    locked = torch.ones(4, 8, dtype=torch.bool)
    locked[2:, 4:] = False
    _, kept = solver().solve(torch.zeros(4, 8), torch.eye(8), get_pattern(text), 0.5, mask_RC=locked)
    assert not kept[2:, 4:].any() and int((~kept).sum()) == 16


def test_a_mask_with_more_zeros_than_the_sparsity_keeps_them():
    mask = random_mask(6, 32, share=0.6)
    _, kept = solver(8).solve(random(6, 32), correlated(32), get_pattern("unstructured"), 0.3, mask_RC=mask)
    assert torch.equal(kept, mask)


def test_weights_of_dead_inputs_become_zero_and_change_no_others():
    weight, x = random(6, 16), random(80, 16, seed=4)
    x[:, [0, 5, 15]] = 0
    gram, alive = x.t() @ x, torch.tensor([j not in (0, 5, 15) for j in range(16)])
    mask = random_mask(6, 16)
    solved, kept = solver(4).solve(weight, gram, mask_RC=mask)
    assert not solved[:, ~alive].any() and torch.equal(kept, mask)
    rest, _ = solver(4).solve(weight[:, alive], gram[alive][:, alive], mask_RC=mask[:, alive])
    assert torch.allclose(solved[:, alive], rest, rtol=1e-9, atol=1e-12)
    # they are pruned first: 3 of 16 columns
    _, kept = solver().solve(weight, gram, get_pattern("unstructured"), 3 / 16)
    assert torch.equal(kept, alive.expand(6, 16))


def test_batched_is_as_one_by_one():
    gram, unstructured = correlated(40), get_pattern("unstructured")
    locked = random_mask(4, 40, share=0.1)
    requests = [
        PruneRequest(random(5, 40, seed=1), pattern=unstructured, sparsity=0.5),
        PruneRequest(random(8, 40, seed=2), pattern=get_pattern("2:4"), sparsity=0.5),
        PruneRequest(random(4, 40, seed=3), locked, unstructured, 0.7),
        PruneRequest(random(3, 40, seed=4), random_mask(3, 40)),
        PruneRequest(100 * random(6, 40, seed=5).float(), pattern=unstructured, sparsity=0.2),
    ]
    factor = HessianFactor(gram)
    batched = solver(16).solve_batched(requests, factor)
    for request, (weight, mask) in zip(requests, batched, strict=True):
        alone = solver(16).solve(request.weight_RC, factor, request.pattern, request.sparsity, request.mask_RC)
        assert torch.equal(mask, alone[1]) and weight.dtype == request.weight_RC.dtype
        assert torch.allclose(weight, alone[0], rtol=1e-6)


@pytest.mark.parametrize("text, sparsity", [("unstructured", 0.5), ("2:4", 0.5), ("1x4", 0.5)])
def test_the_order_of_rows_does_not_matter(text, sparsity):
    weight, gram, order = random(8, 32), correlated(32), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    solved, kept = solver(16).solve(weight, gram, get_pattern(text), sparsity)
    moved, moved_kept = solver(16).solve(weight[order], gram, get_pattern(text), sparsity)
    assert torch.equal(kept[order], moved_kept) and torch.allclose(solved[order], moved, rtol=1e-9, atol=1e-12)


def test_how_tokens_are_split_into_batches_does_not_matter():
    x, weight = random(90, 24).float(), random(6, 24).float()
    whole, parts = GramMatrix(24), [GramMatrix(24), GramMatrix(24)]
    whole.observe(x)
    for index, batch in enumerate(x[torch.arange(89, -1, -1)].split(17)):
        parts[index % 2].observe(batch)
    parts[0].total += parts[1].total
    parts[0].count += parts[1].count
    first, second = (solver().solve(weight, gram, get_pattern("unstructured"), 0.5) for gram in (whole, parts[0]))
    assert torch.equal(first[1], second[1]) and torch.allclose(first[0], second[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text, width",
    [("unstructured", 1), ("2:4", 4), ("4x1", 1), ("2x2", 2), ("1x6", 6), ("channel:in", 1), ("channel", 24)],
)
def test_the_fewest_columns_that_select_by_themselves(text, width):
    assert sparsegpt._width(get_pattern(text), 8, 24) == width


def test_invalid_requests_are_refused():
    weight, gram = random(4, 8), correlated(8)
    for text in ("channel", "1x8"):
        with pytest.raises(ValueError, match="cannot select units of .* whole rows are pruned"):
            solver().solve(weight, gram, get_pattern(text), 0.5)
    rows = torch.tensor([True, False, True, False])[:, None].expand(4, 8)
    assert torch.equal(solver().solve(weight, gram, mask_RC=rows)[0], weight * rows)  # a mask of rows is fine
    with pytest.raises(ValueError, match="always gives sparsity 0.5 with 2:4, not 0.25"):
        solver().solve(weight, gram, get_pattern("2:4"), 0.25)
    with pytest.raises(ValueError, match="the weight has 8 inputs, but the Gram matrix is of 9"):
        solver().solve(weight, correlated(9), get_pattern("unstructured"), 0.5)
