"""SparseGPT against its definition, written out naively in float64: the inverse of what is left of the matrix at each
column, one column after another."""

import pytest
import torch

from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import SOLVERS, HessianFactor, PruneRequest, output_energy, sparsegpt
from hf_sparse.statistics import GramMatrix


CHOICES = [("unstructured", 0.5), ("unstructured", 0.25), ("2:4", 0.5), ("1:4", 0.75), ("4x1", 0.5), ("2x2", 0.25)]
CHOICES += [("1x4", 0.5), ("channel:in", 0.5)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(columns, tokens=300, seed=1):
    x = random(tokens, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return x.t() @ x


def solver(block=128):
    return SOLVERS["sparsegpt"](block=block)


def random_mask(*shape, share=0.5, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


def eliminated(weight, gram, choose, block):
    """The paper's definition. choose(first, scores of the block's columns) -> which are kept, (R, width), or None."""
    weight, columns = weight.clone(), len(gram)
    kept = torch.ones_like(weight, dtype=torch.bool)
    worth = torch.stack([1 / torch.linalg.inv(gram[j:, j:])[0, 0] for j in range(columns)])
    for j in range(columns):
        if j % block == 0:
            here = slice(j, j + block)
            kept[:, here] = choose(j, (weight[:, here] ** 2 * worth[here]).float())
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
    found, kept = solver(block).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    expected, _ = eliminated(weight, gram, lambda j, scores: mask[:, j : j + 4], 4)
    assert torch.equal(kept, mask) and torch.allclose(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("block", [4, 16, 128])
@pytest.mark.parametrize("text, sparsity", CHOICES)
def test_its_own_choice_is_the_definition(text, sparsity, block):
    """Per block of columns over all rows, of N:M per group; scores w²/[inverse of what is left]_jj."""
    pattern, columns = get_pattern(text), 48
    weight, gram = random(8, columns), correlated(columns)
    found, kept = solver(block).solve(weight, HessianFactor(gram, 0), pattern, sparsity)

    def choose(first, scores):
        if pattern.max_sparsity < 1:
            return pattern.pool(scores[:, None, :])[:, 0] == torch.inf
        units = pattern.pool(scores[:, None, :])
        order = units.flatten().argsort(stable=True)
        keep = torch.ones(units.numel(), dtype=torch.bool)
        keep[order[: round(sparsity * units.numel())]] = False
        return pattern.expand(keep.view(units.shape), (8, 1, scores.shape[1])).expand(8, 1, -1)[:, 0]

    width = pattern.of if pattern.max_sparsity < 1 else min(block, columns)
    expected, mask = eliminated(weight, gram, choose, width)
    assert torch.equal(kept, mask)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-9)


def test_one_column_at_the_front_is_the_closed_form():
    """Optimal Brain Surgeon: w - w_0/[H⁻¹]_00·H⁻¹_0, with the error w_0²/[H⁻¹]_00."""
    weight, gram = random(1, 9), correlated(9)
    mask = torch.tensor([[False] + [True] * 8])
    found, _ = solver(4).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    inverse = torch.linalg.inv(gram)
    assert torch.allclose(found, weight - weight[0, 0] / inverse[0, 0] * inverse[0], rtol=1e-9, atol=1e-10)
    assert torch.allclose(error_of(found - weight, gram), weight[0, 0] ** 2 / inverse[0, 0])


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("fallen", [1, 4, 11, 12])
def test_what_falls_left_of_what_is_kept_leaves_the_least_squares_solution(fallen, block):
    """min ‖(w - ŵ)X‖² over ŵ of the kept: ŵ_K = w_K + w_F·G_FK·G_KK⁻¹."""
    weight, gram = random(5, 12), correlated(12)
    mask = torch.arange(12).expand(5, 12) >= fallen
    found, _ = solver(block).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    moved = weight[:, :fallen] @ gram[:fallen, fallen:] @ torch.linalg.inv(gram[fallen:, fallen:])
    assert torch.allclose(found[:, fallen:], weight[:, fallen:] + moved, rtol=1e-8, atol=1e-9)


def test_nothing_left_of_the_first_that_falls_changes():
    weight, gram = random(4, 20).float(), correlated(20).float()
    mask = torch.arange(20).expand(4, 20) != 13
    found, _ = solver(8).solve(weight, gram, mask_RC=mask)
    assert torch.equal(found[:, :13], weight[:, :13]) and (found[:, 14:] != weight[:, 14:]).all()


def test_the_error_is_the_sum_of_what_each_column_costs():
    """For each row, sum over what falls of (w_j at its turn)²/[inverse of what is left]_jj."""
    weight, gram, mask = random(6, 15), correlated(15), random_mask(6, 15)
    costs, now = torch.zeros(6, dtype=torch.float64), weight.clone()
    for j in range(15):
        inverse = torch.linalg.inv(gram[j:, j:])
        falling = torch.where(mask[:, j], 0.0, now[:, j])
        costs += falling**2 / inverse[0, 0]
        now[:, j:] -= falling[:, None] / inverse[0, 0] * inverse[0]
    found, _ = solver(4).solve(weight, HessianFactor(gram, 0), mask_RC=mask)
    assert torch.allclose(error_of(found - weight, gram), costs, rtol=1e-8)


@pytest.mark.parametrize("text, sparsity", CHOICES)
@pytest.mark.parametrize("kind", ["independent", "correlated", "low rank"])
def test_the_error_is_never_above_that_of_zero_with_the_same_mask(kind, text, sparsity):
    """Columns settle from the left, so this is no theorem for each row; it holds for each of these, by far."""
    for seed in range(5):
        x = random(100, 64, seed=10 + seed)
        if kind == "correlated":
            x = x @ random(64, 64, seed=20 + seed)
        if kind == "low rank":
            x = random(200, 16, seed=seed) @ random(16, 64, seed=20 + seed) + 0.1 * random(200, 64, seed=seed)
        gram = GramMatrix(64)
        gram.observe(x)
        weight = random(32, 64, seed=30 + seed).float()
        found, mask = solver(16).solve(weight, gram, get_pattern(text), sparsity)
        zeroed, _ = SOLVERS["zero"]().solve(weight, mask_RC=mask)
        error, plain = output_energy(found - weight, gram), output_energy(zeroed - weight, gram)
        assert error < plain
        magnitude = weight.abs() > weight.abs().flatten().kthvalue(1024)[0]
        found, _ = solver(16).solve(weight, gram, mask_RC=magnitude)
        zeroed, _ = SOLVERS["zero"]().solve(weight, mask_RC=magnitude)
        assert output_energy(found - weight, gram) < output_energy(zeroed - weight, gram)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 0.333, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("rows, columns, block", [(3, 50, 7), (8, 48, 16), (1, 130, 128)])
def test_exactly_the_asked_number_falls_spread_over_blocks(rows, columns, block, sparsity):
    gram = correlated(columns).float()
    for weight in (random(rows, columns).float(), torch.ones(rows, columns)):
        _, kept = solver(block).solve(weight, gram, get_pattern("unstructured"), sparsity)
        assert int((~kept).sum()) == round(sparsity * rows * columns)
        for part in kept.split(block, dim=1):
            assert abs(int((~part).sum()) - sparsity * part.numel()) < 1.001


def test_ties_fall_by_position():
    """Constant weights of independent inputs: the first of each block fall, row after row."""
    _, kept = solver(4).solve(torch.ones(2, 8), torch.eye(8), get_pattern("unstructured"), 0.75)
    assert ["".join(".#"[each] for each in row) for row in kept.tolist()] == ["........", "..##..##"]
    _, kept = solver(4).solve(torch.ones(2, 8), torch.eye(8), get_pattern("2:4"), 0.5)
    assert ["".join(".#"[each] for each in row) for row in kept.tolist()] == ["..##..##"] * 2


@pytest.mark.parametrize("text, sparsity", CHOICES)
def test_zeros_that_are_there_stay_and_count(text, sparsity):
    pattern, weight, gram = get_pattern(text), random(8, 32), correlated(32)
    locked = random_mask(8, 32, share=0.2)
    if text not in ("unstructured", "2:4", "1:4"):  # whole units, and some that are only in part
        units = random_mask(*pattern.unit_shape((8, 1, 32)), share=0.1)
        locked = pattern.expand(units, (8, 1, 32)).expand(8, 1, 32)[:, 0].clone()
        locked[0, 0] = False
    weight = weight * locked
    found, kept = solver(16).solve(weight, HessianFactor(gram, 0), pattern, sparsity, mask_RC=locked)
    assert not (kept & ~locked).any() and not found[~kept].any()
    units = pattern.pool(kept.float()[:, None, :])
    if pattern.max_sparsity < 1:
        groups, before = kept.view(8, 8, 4).sum(2), locked.view(8, 8, 4).sum(2)
        assert torch.equal(groups, before.clamp(max=pattern.keep))
    else:
        assert int((units == 0).sum()) == round(sparsity * units.numel())
    expected, _ = solver(16).solve(weight, HessianFactor(gram, 0), mask_RC=kept)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("text", ["unstructured", "2x2"])
def test_zeros_of_the_mask_fall_before_weights_that_are_zero(text):
    """All scores are 0; what is locked lies last by position, and counts."""
    locked = torch.ones(4, 8, dtype=torch.bool)
    locked[2:, 4:] = False
    _, kept = solver().solve(torch.zeros(4, 8), torch.eye(8), get_pattern(text), 0.5, mask_RC=locked)
    assert not kept[2:, 4:].any() and int((~kept).sum()) == 16


def test_a_mask_with_more_zeros_than_asked_keeps_them():
    mask = random_mask(6, 32, share=0.6)
    _, kept = solver(8).solve(random(6, 32), correlated(32), get_pattern("unstructured"), 0.3, mask_RC=mask)
    assert torch.equal(kept, mask)


def test_dead_inputs_become_zero_and_touch_nothing():
    weight, x = random(6, 16), random(80, 16, seed=4)
    x[:, [0, 5, 15]] = 0
    gram, alive = x.t() @ x, torch.tensor([j not in (0, 5, 15) for j in range(16)])
    mask = random_mask(6, 16)
    found, kept = solver(4).solve(weight, gram, mask_RC=mask)
    assert not found[:, ~alive].any() and torch.equal(kept, mask)
    rest, _ = solver(4).solve(weight[:, alive], gram[alive][:, alive], mask_RC=mask[:, alive])
    assert torch.allclose(found[:, alive], rest, rtol=1e-9, atol=1e-12)
    # they are the first to fall: 3 of 16 columns
    _, kept = solver().solve(weight, gram, get_pattern("unstructured"), 3 / 16)
    assert torch.equal(kept, alive.expand(6, 16))


def test_rows_solved_together_are_solved_as_alone():
    gram, unstructured = correlated(40), get_pattern("unstructured")
    locked = random_mask(4, 40, share=0.1)
    wanted = [
        PruneRequest(random(5, 40, seed=1), pattern=unstructured, sparsity=0.5),
        PruneRequest(random(8, 40, seed=2), pattern=get_pattern("2:4"), sparsity=0.5),
        PruneRequest(random(4, 40, seed=3), locked, unstructured, 0.7),
        PruneRequest(random(3, 40, seed=4), random_mask(3, 40)),
        PruneRequest(100 * random(6, 40, seed=5).float(), pattern=unstructured, sparsity=0.2),
    ]
    factor = HessianFactor(gram)
    together = solver(16).solve_batched(wanted, factor)
    for each, (weight, mask) in zip(wanted, together, strict=True):
        alone = solver(16).solve(each.weight_RC, factor, each.pattern, each.sparsity, each.mask_RC)
        assert torch.equal(mask, alone[1]) and weight.dtype == each.weight_RC.dtype
        assert torch.allclose(weight, alone[0], rtol=1e-6)


@pytest.mark.parametrize("text, sparsity", [("unstructured", 0.5), ("2:4", 0.5), ("1x4", 0.5)])
def test_the_order_of_rows_does_not_matter(text, sparsity):
    weight, gram, order = random(8, 32), correlated(32), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    found, kept = solver(16).solve(weight, gram, get_pattern(text), sparsity)
    moved, moved_kept = solver(16).solve(weight[order], gram, get_pattern(text), sparsity)
    assert torch.equal(kept[order], moved_kept) and torch.allclose(found[order], moved, rtol=1e-9, atol=1e-12)


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
def test_the_fewest_columns_that_decide_by_themselves(text, width):
    assert sparsegpt._width(get_pattern(text), 8, 24) == width


def test_what_is_refused():
    weight, gram = random(4, 8), correlated(8)
    for text in ("channel", "1x8"):
        with pytest.raises(ValueError, match="cannot choose for .* whole rows fall"):
            solver().solve(weight, gram, get_pattern(text), 0.5)
    rows = torch.tensor([True, False, True, False])[:, None].expand(4, 8)
    assert torch.equal(solver().solve(weight, gram, mask_RC=rows)[0], weight * rows)  # a mask of rows is fine
    with pytest.raises(ValueError, match="ends at sparsity 0.5 with NOfM.*, and not at 0.25"):
        solver().solve(weight, gram, get_pattern("2:4"), 0.25)
    with pytest.raises(ValueError, match="the weight has 8 inputs, but the Gram matrix is of 9"):
        solver().solve(weight, correlated(9), get_pattern("unstructured"), 0.5)
