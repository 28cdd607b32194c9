"""Criteria: values by hand where the docstrings do not give them, and criteria that users register."""

import pytest
import torch
from torch import nn

from hf_sparse import Criterion, Pruner, PruningConfig, register_criterion
from hf_sparse.criteria import CRITERIA, GradientCriterion


def test_random_is_uniform_and_independent_between_layers():
    positions = torch.arange(200_000)
    first, second = (CRITERIA.create("random").score(positions, positions + (salt << 31)) for salt in (0, 2**32 - 1))
    for scores in (first, second):
        assert 0 <= scores.min() and scores.max() < 1
        # 20 bins of 10,000: a count is 5 standard deviations away at 490
        assert (torch.histc(scores, 20, 0, 1) - 10_000).abs().max() < 490
        assert abs(torch.corrcoef(torch.stack([scores[1:], scores[:-1]]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.02


def linear(values):
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([values]))
    return model


def test_a_users_criterion_may_return_its_input():
    """The scores are written to on the way; the weight must not be."""

    @register_criterion("signed")
    class Signed(Criterion):
        def score(self, weight, statistic):
            return weight

    model = linear([3.0, -4.0, 1.0, 2.0])
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="signed"))
    pruner.update(1, 2)
    pruner.update(2, 2)
    assert model[0].weight.tolist() == [[3.0, 0.0, 0.0, 2.0]]


def test_a_users_criterion_may_score_in_any_dtype_but_not_in_any_shape():
    @register_criterion("double")
    class Double(Criterion):
        def score(self, weight, statistic):
            return weight.detach().double().abs()

    @register_criterion("row_norm")
    class RowNorm(Criterion):
        def score(self, weight, statistic):
            return weight.detach().norm(dim=-1)

    model = linear([3.0, -4.0, 1.0, 2.0])
    Pruner(model, PruningConfig(target_sparsity=0.5, criterion="double")).update(1, 1)
    assert model[0].weight.tolist() == [[3.0, -4.0, 0.0, 0.0]]
    pruner = Pruner(model, PruningConfig(target_sparsity=0.75, criterion="row_norm"))
    with pytest.raises(ValueError, match='criterion "RowNorm" must return one score per weight'):
        pruner.update(1, 1)


def test_sums_that_restart_and_sums_that_continue():
    """After a prune step."""
    sums = [name for name in CRITERIA.names() if issubclass(CRITERIA[name], GradientCriterion)]
    persistent = {name for name in sums if CRITERIA[name].persistent}
    assert {"greedy_movement", "snip_momentum"} <= persistent and not persistent & {"snip", "taylor", "gradient"}
