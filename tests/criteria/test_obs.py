"""Greedy removal of units, against a search that solves least squares for every candidate in float64."""

import pytest
import torch

from hf_sparse.criteria import CRITERIA
from hf_sparse.criteria.obs import OptimalBrainSurgeon


def problem(units, width, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = units * width
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(5 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.t() @ x


def least_error(weight, gram, kept):
    """The squared error of the best weights in the columns `kept`."""
    pruned = [column for column in range(len(gram)) if column not in kept]
    schur = gram[pruned][:, pruned]
    if kept:
        schur = schur - gram[pruned][:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, pruned])
    return float((weight[:, pruned] @ schur * weight[:, pruned]).sum())


def greedy_order(weight, gram, width, ridge):
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    alive, order = list(range(len(gram) // width)), []
    while alive:

        def error(unit, alive=alive):
            kept = [u * width + i for u in alive if u != unit for i in range(width)]
            return least_error(weight, gram, kept)

        order.append(min(alive, key=error))
        alive.remove(order[-1])
    return order


@pytest.mark.parametrize("units, width", [(9, 1), (6, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_units_are_removed_in_the_order_of_a_greedy_search(units, width, seed):
    weight, gram = problem(units, width, seed=seed)
    expected = greedy_order(weight, gram, width, 0.01)
    scores = OptimalBrainSurgeon(columns_at_once=1).score_units(weight.float(), gram.float(), width)
    assert scores.shape == (units,) and scores.argsort(stable=True).tolist() == expected


def test_with_a_count_the_other_units_are_kept_and_the_removed_ones_are_the_same():
    weight, gram = problem(40, 1, seed=2)
    criterion = OptimalBrainSurgeon(columns_at_once=4)
    every = criterion.score_units(weight.float(), gram.float(), 1)
    some = criterion.score_units(weight.float(), gram.float(), 1, count=14)
    removed = some.isfinite()
    assert int(removed.sum()) == 14 and torch.isfinite(every).all()
    assert set(every.argsort()[:14].tolist()) == set(removed.nonzero()[:, 0].tolist())


def test_a_unit_that_others_repeat_goes_first_and_a_single_one_of_its_copies():
    weight, gram = torch.full((2, 4), 3.0), torch.eye(4)
    gram[0, 1] = gram[1, 0] = 0.999  # inputs 0 and 1 are nearly the same
    scores = OptimalBrainSurgeon(columns_at_once=1).score_units(weight, gram, 1)
    assert scores.argmin() in (0, 1) and scores[[0, 1]].max() == scores.max()


def test_dead_inputs_go_first_and_nothing_is_modified():
    weight, gram = problem(8, 1, seed=3)
    weight, gram = weight.float(), gram.float()
    gram[2] = gram[:, 2] = 0
    before = weight.clone(), gram.clone()
    assert OptimalBrainSurgeon(columns_at_once=1).score_units(weight, gram, 1).argmin() == 2
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])
    assert torch.isfinite(OptimalBrainSurgeon().score_units(weight, torch.zeros(8, 8), 1)).all()


def test_options_out_of_range():
    for options in ({"ridge": 0}, {"ridge": 1.5}, {"columns_at_once": 0}):
        with pytest.raises(ValueError, match=f'"{next(iter(options))}" is .* it must be'):
            CRITERIA.create("obs", options)
