"""The contract of every registered solver."""

import pytest
import torch

from hf_sparse import Requires
from hf_sparse.patterns import get_pattern
from hf_sparse.solvers import SOLVERS, PruneRequest, output_energy
from hf_sparse.statistics import GramMatrix


ROWS, COLUMNS = 12, 40
SELECTING = [name for name in SOLVERS.names() if SOLVERS[name].selects]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stat_of(name, columns=COLUMNS):
    gram = GramMatrix(columns)
    gram.observe(random(100, columns, seed=7))
    return gram if SOLVERS[name].requires & Requires.GRAM else None


def mask_of(share=0.6, rows=ROWS, seed=1):
    return torch.rand(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SOLVERS.names())
def test_weights_are_zero_where_the_mask_is_false_and_inputs_stay(name, dtype):
    weight, mask, stat = -random(ROWS, COLUMNS).abs().to(dtype), mask_of(), stat_of(name)
    weight.requires_grad_()
    before = weight.detach().clone(), mask.clone(), None if stat is None else stat.total.clone()
    solved, kept = SOLVERS.create(name).solve(weight, stat, mask_RC=mask)
    assert torch.equal(kept, mask) and kept.dtype == torch.bool
    assert solved.shape == weight.shape and solved.dtype == dtype and not solved.requires_grad
    assert torch.equal(solved == 0, ~mask) and torch.isfinite(solved).all()
    assert not torch.signbit(solved[~mask]).any(), "not +0.0"
    solved.fill_(7)
    kept.fill_(True)
    assert torch.equal(weight.detach(), before[0]) and torch.equal(mask, before[1])
    assert stat is None or torch.equal(stat.total, before[2])


@pytest.mark.parametrize("name", SOLVERS.names())
def test_a_mask_that_keeps_all_changes_nothing_and_one_that_keeps_none_leaves_nothing(name):
    weight = random(ROWS, COLUMNS)
    for mask in (torch.ones(ROWS, COLUMNS, dtype=torch.bool), torch.zeros(ROWS, COLUMNS, dtype=torch.bool)):
        assert torch.equal(SOLVERS.create(name).solve(weight, stat_of(name), mask_RC=mask)[0], weight * mask)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_views_of_any_layout_are_solved_as_contiguous_copies(name):
    """GPT-2's Conv1D holds (I, O): the matrix is a transposed view of the parameter, which must not change."""
    parameter, mask = random(COLUMNS, ROWS), mask_of()
    before = parameter.clone()
    solved, _ = SOLVERS.create(name).solve(parameter.t(), stat_of(name), mask_RC=mask.t().contiguous().t())
    expected, _ = SOLVERS.create(name).solve(parameter.t().contiguous(), stat_of(name), mask_RC=mask)
    assert torch.equal(solved, expected) and torch.equal(parameter, before)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_batched_is_as_one_by_one(name):
    requests = [PruneRequest(random(rows, COLUMNS, seed=rows), mask_of(rows=rows, seed=rows)) for rows in (3, 12, 1)]
    batched = SOLVERS.create(name).solve_batched(requests, stat_of(name))
    for request, (weight, mask) in zip(requests, batched, strict=True):
        alone = SOLVERS.create(name).solve(request.weight_RC, stat_of(name), mask_RC=request.mask_RC)
        assert torch.equal(mask, alone[1]) and torch.allclose(weight, alone[0], rtol=1e-5, atol=1e-6)
    assert SOLVERS.create(name).solve_batched([], stat_of(name)) == []


@pytest.mark.parametrize("name", SOLVERS.names())
def test_the_error_is_never_above_that_of_no_update(name):
    weight, mask, gram = random(ROWS, COLUMNS), mask_of(), stat_of("sparsegpt")
    solved, _ = SOLVERS.create(name).solve(weight, stat_of(name), mask_RC=mask)
    assert output_energy(solved - weight, gram) <= output_energy(weight * mask - weight, gram) * (1 + 1e-6)


def test_none_leaves_kept_weights_as_they_are():
    weight, mask = random(ROWS, COLUMNS).to(torch.bfloat16), mask_of()
    solved, _ = SOLVERS.create("none").solve(weight, mask_RC=mask)
    assert torch.equal(solved[mask].view(torch.int16), weight[mask].view(torch.int16))


@pytest.mark.parametrize("text, sparsity", [("unstructured", 0.35), ("2:4", 0.5), ("1:4", 0.75), ("4x1", 0.5)])
@pytest.mark.parametrize("name", SELECTING)
def test_exactly_the_given_sparsity_is_pruned_also_of_constant_weights(name, text, sparsity):
    for weight in (random(ROWS, COLUMNS), torch.ones(ROWS, COLUMNS)):
        solved, kept = SOLVERS.create(name).solve(weight, stat_of(name), get_pattern(text), sparsity)
        assert int((~kept).sum()) == round(sparsity * kept.numel()) and not solved[~kept].any()
        if ":" in text:
            keep, of = map(int, text.split(":"))
            assert (kept.view(ROWS, -1, of).sum(2) == keep).all()


@pytest.mark.parametrize("name", [name for name in SOLVERS.names() if not SOLVERS[name].selects])
def test_a_solver_that_needs_a_mask_refuses_a_sparsity(name):
    with pytest.raises(ValueError, match=f'solver "{name}" selects no units itself: give it a mask'):
        SOLVERS.create(name).solve(random(2, 4), stat_of(name, 4), get_pattern("unstructured"), 0.5)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_invalid_requests_are_refused(name):
    solver, weight, stat = SOLVERS.create(name), random(6, 10), stat_of(name, 10)
    unstructured = get_pattern("unstructured")
    for arguments, message in (
        ({}, "a request needs a mask, or a pattern together with a sparsity"),
        ({"pattern": unstructured}, "a request needs a mask, or a pattern together with a sparsity"),
        ({"pattern": unstructured, "sparsity": 1.5}, "sparsity is 1.5: it must be from 0 to 1"),
        ({"pattern": get_pattern("2:4"), "sparsity": 0.5}, "input size divisible by 4, but the weight has 6 outputs"),
        ({"mask_RC": torch.ones(6, 9, dtype=torch.bool)}, r"a mask must be bool, of shape \(6, 10\)"),
        ({"mask_RC": torch.ones(6, 10)}, r"a mask must be bool, of shape \(6, 10\), but is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            solver.solve(weight, stat, **arguments)
    mask = torch.ones(6, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match="a weight must be a matrix of floats"):
        solver.solve(weight[None], stat, mask_RC=mask[None])
    weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="a weight holds inf or nan"):
        solver.solve(weight, stat, mask_RC=mask)


def test_output_energy_is_the_sum_over_tokens():
    x, weight = random(50, 9, seed=2), random(4, 9)
    gram = GramMatrix(9)
    gram.observe(x)
    assert output_energy(weight, gram) == pytest.approx(float((x @ weight.t()).square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_the_operations_of_plans_are_finite_and_grow_with_the_matrix(name):
    solver = SOLVERS.create(name)
    small, wide, high = (
        solver.factor_operations(columns) + solver.operations(rows, columns)
        for rows, columns in ((8, 16), (8, 32), (16, 16))
    )
    assert 0 <= small <= high <= wide < float("inf")
    assert (small < high) == solver.updates
