"""Trainer may multiply BERT's loss by the number of processes (see the README): masks are the same."""

import pytest
from helpers.modes import mode_params
from helpers.tiny import SCHEDULE, same


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2", "zero2"))
def test_loss_scale_changes_no_mask(ranks, mode):
    """With learning rate 0, weights change by pruning only."""
    options = {"target_sparsity": 0.5, "criterion": "snip_momentum", "learning_rate": 0.0, **SCHEDULE}
    right, large = (
        ranks.run(mode, "scaled", options=options | {"average_tokens_across_devices": scaled})
        for scaled in (False, True)
    )
    losses = [[row["loss"] for row in run.ranks[0]["log"] if "loss" in row] for run in (right, large)]
    assert [pytest.approx(2 * loss, rel=1e-3) for loss in losses[0]] == losses[1]
    assert same(right.weights, large.weights)
    assert any(not (weight != 0).all() for weight in right.weights.values())
