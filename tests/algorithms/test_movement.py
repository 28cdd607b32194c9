"""Movement pruning by its options, and the criterion that had its name."""

import re

import pytest
from helpers.modes import deterministic_bert

from hf_sparse import Pruner, PruningConfig, PruningConfigError


def test_the_criterion_that_had_this_name_is_read_from_old_files_and_refused_by_name():
    old = {"target_sparsity": 0.5, "criterion": "movement", "groups": {"a": {"criterion": "movement"}}}
    config = PruningConfig.from_dict(old)
    assert config.criterion == config.groups["a"]["criterion"] == "greedy_movement"
    message = 'Did you mean "greedy_movement"? Another option has a method of this name: `algorithm="movement"`.'
    with pytest.raises(PruningConfigError, match=re.escape(message)):
        PruningConfig(target_sparsity=0.5, criterion="movement")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"algorithm": "movement", "criterion": "snip"}, "ranks weights by what it learns: leave `criterion` out"),
        ({"algorithm": "movement", "keep_zeros": True}, "pruned weights may come back: leave `keep_zeros` out"),
        ({"algorithm": "sr_ste", "pattern": "head"}, "selects weights and blocks, not units of `pattern`"),
        ({"algorithm": "soft_movement", "pattern": "2:4"}, "compares single weights with a threshold"),
        ({"algorithm": "movement", "algorithm_kwargs": {"learning_rate": 0}}, "it must be above 0, as in 1e-2"),
        ({"algorithm": "movement", "algorithm_kwargs": {"init_scale": -1}}, "it must be 0 or more, as in 1.0"),
        ({"algorithm": "soft_movement", "algorithm_kwargs": {"threshold": 1.0}}, "it must be between 0 and 1"),
        ({"algorithm": "soft_movement", "algorithm_kwargs": {"lambda_": -1.0}}, "it must be 0 or more, as in 100.0"),
        ({"algorithm": "sr_ste", "algorithm_kwargs": {"decay": -1.0}}, "it must be 0 or more, as in 2e-4"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(PruningConfigError, match=re.escape(message)):
        PruningConfig(**{"target_sparsity": 0.5} | options)


def test_frozen_weights_are_refused_by_name():
    model = deterministic_bert()
    model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    with pytest.raises(PruningConfigError, match='`algorithm` "movement" needs gradients, but "bert.encoder.layer.0'):
        Pruner(model, PruningConfig(target_sparsity=0.5, algorithm="movement"))
