"""BERT's loss comes out as many times too large as there are processes; masks are the same (see the README)."""

import pytest
from helpers.modes import each
from helpers.tiny import SCHEDULE, same


@pytest.mark.parametrize("mode", each("ddp", "fsdp2", "zero2"))
def test_a_loss_times_the_number_of_processes_changes_no_mask(ranks, mode):
    """Weights stay as they are, but for the zeros."""
    options = {"target_sparsity": 0.5, "criterion": "snip_momentum", "learning_rate": 0.0, **SCHEDULE}
    right, large = (
        ranks.run(mode, "scaled", options=options | {"average_tokens_across_devices": scaled})
        for scaled in (False, True)
    )
    losses = [[row["loss"] for row in run.ranks[0]["log"] if "loss" in row] for run in (right, large)]
    assert [pytest.approx(2 * loss, rel=1e-3) for loss in losses[0]] == losses[1]
    assert same(right.weights, large.weights)
    assert any(not (weight != 0).all() for weight in right.weights.values())
