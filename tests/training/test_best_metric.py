"""No metric is better than a blocked one, as Trainer compares them."""

import json

import numpy as np
import pytest
from helpers.tiny import arguments
from transformers import TrainerState

from hf_sparse.training.best_metric import block_best_metric, clear_best_metric, unblock_best_metric


@pytest.mark.parametrize("greater_is_better, better", [(True, np.greater), (False, np.less)])
def test_nothing_is_better_until_it_is_unblocked(tmp_path, greater_is_better, better):
    args = arguments(tmp_path, metric_for_best_model="score", greater_is_better=greater_is_better)
    state = TrainerState()
    block_best_metric(args, state)
    assert not better(1e308, state.best_metric) and not better(-1e308, state.best_metric)
    json.dumps(state.best_metric, allow_nan=False)
    unblock_best_metric(state)
    assert state.best_metric is None


def test_a_real_metric_is_kept_until_it_is_cleared(tmp_path):
    state = TrainerState(best_metric=0.5, best_global_step=3, best_model_checkpoint="checkpoint-3")
    block_best_metric(arguments(tmp_path), state)  # without metric_for_best_model nothing is compared
    unblock_best_metric(state)
    assert (state.best_metric, state.best_global_step) == (0.5, 3)
    clear_best_metric(state)
    assert (state.best_metric, state.best_global_step, state.best_model_checkpoint) == (None, None, None)
