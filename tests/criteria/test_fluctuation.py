"""Fluctuation against the error that pruning a column leaves, when its mean goes to the bias."""

import torch

from hf_sparse.criteria.fluctuation import Fluctuation
from hf_sparse.statistics import WeightedMoments


def test_the_score_of_a_column_is_the_error_that_its_mean_cannot_repair():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 4, generator=generator) + 2, torch.randn(3, 4, generator=generator)
    y = x @ weight.t()
    statistic = WeightedMoments(4)
    statistic.observe_outputs(x, y)
    a = 1 / y.square().sum(1)
    a = a / a.sum()
    for column in range(4):
        part = x[:, column : column + 1] @ weight[:, column : column + 1].t()
        error = (a[:, None] * (part - (a[:, None] * part).sum(0)).square()).sum()
        assert torch.isclose(Fluctuation().score(weight, statistic.variances)[:, column].sum(), error, rtol=1e-4)
