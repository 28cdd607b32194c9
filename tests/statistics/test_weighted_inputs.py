"""Weighted sums of inputs, against float64 sums over all tokens."""

import pytest
import torch

from hf_sparse.statistics import WeightedGram, WeightedMoments


def tokens(count=60, columns=7, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator) + torch.arange(columns)
    return x, x @ torch.randn(columns, rows, generator=generator)


def observed(kind, x, y, keep=None):
    statistic = kind(x.shape[-1])
    statistic.observe_outputs(x, y, keep)
    return statistic


@pytest.mark.parametrize("kind", [WeightedMoments, WeightedGram])
def test_sums_and_variances_are_those_of_tokens_weighted_by_their_output(kind):
    x, y = tokens()
    statistic = observed(kind, x, y)
    a, x = 1 / y.double().square().sum(1), x.double()
    mean = (a[:, None] * x).sum(0) / a.sum()
    assert statistic.count == 60 and float(statistic.weight) == pytest.approx(float(a.sum()), rel=1e-5)
    assert torch.allclose(statistic.sums.double(), (a[:, None] * x).sum(0), rtol=1e-5)
    assert torch.allclose(statistic.norms.double(), (a[:, None] * x.square()).sum(0).sqrt(), rtol=1e-5)
    variances = (a[:, None] * (x - mean).square()).sum(0) / a.sum()
    assert torch.allclose(statistic.variances.double(), variances, rtol=1e-4)


def test_the_centered_matrix_is_that_of_inputs_less_their_means():
    x, y = tokens()
    statistic = observed(WeightedGram, x, y)
    a, x = 1 / y.double().square().sum(1), x.double()
    assert torch.allclose(statistic.matrix_without_bias().double(), x.t() @ (a[:, None] * x), rtol=1e-5)
    x = x - (a[:, None] * x).sum(0) / a.sum()
    assert torch.allclose(statistic.centered_matrix().double(), x.t() @ (a[:, None] * x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [WeightedMoments, WeightedGram])
def test_batches_add_up_and_padding_does_not_count(kind):
    x, y = tokens()
    whole, halves = observed(kind, x, y), observed(kind, x[:25], y[:25])
    spoilt = x[25:].view(5, 7, 7).clone()
    keep = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    other = observed(kind, x[25:][keep.view(-1)], y[25:][keep.view(-1)])
    spoilt[~keep] = float("nan")
    padded = observed(kind, spoilt, y[25:].view(5, 7, -1), keep)
    assert torch.equal(padded.total, other.total) and padded.count == int(keep.sum())
    halves.observe_outputs(x[25:], y[25:])
    assert halves.count == whole.count and torch.allclose(halves.total, whole.total, rtol=1e-5)


@pytest.mark.parametrize("kind", [WeightedMoments, WeightedGram])
def test_a_token_without_an_output_has_a_finite_weight(kind):
    statistic = observed(kind, torch.tensor([[1.0, 0.0]]), torch.zeros(1, 3))
    assert torch.isfinite(statistic.total.tril()).all() and not statistic.variances.any()
