"""Penalties on several ranks: the weights of one process, wherever a split divides units."""

import pytest
from helpers.modes import MODES, mode_params
from helpers.tiny import SCHEDULE, same


# 4x1: two ranks split a block of the 44 rows. channel:in: every unit is divided. head: slices of several weights.
PATTERNS = ["4x1", "channel:in", "head"]


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2", "zero3"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_ranks_train_as_one_process(ranks, mode, pattern):
    options = {"target_sparsity": 0.5, "criterion": "magnitude", "pattern": pattern, "penalty": "group_lasso"}
    options |= {"penalty_kwargs": {"strength": 0.01}, **SCHEDULE}
    runs = [
        ranks.run(name, f"{mode}-{pattern}-penalty", world=world, options=options)
        for name, world in [(MODES[mode].exact_as, 1), (mode, 2)]
    ]
    assert same(*(run.weights for run in runs))
    single, *others = ([log["penalty_group_lasso"] for log in rank["log"][:-1]] for run in runs for rank in run.ranks)
    for logged in others:
        assert single[0] > 0 and logged == [pytest.approx(value, rel=1e-9) for value in single]
