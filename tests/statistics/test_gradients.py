"""GradientStatistic: sums over optimizer steps, computed by hand."""

import pytest
import torch

from hf_sparse import numerics
from hf_sparse.criteria import CRITERIA
from hf_sparse.statistics import GradientStatistic, all_finite


WEIGHTS = [torch.tensor([1.0, -2.0, 4.0]), torch.tensor([0.5, -1.0, 0.0])]
GRADIENTS = [torch.tensor([0.5, 0.5, -1.0]), torch.tensor([2.0, -3.0, 1.0])]
# Step 1: w·g = 0.5, -1, -4. Step 2: w·g = 1, 3, 0.
SUMS = {
    "gradient": [2.5, 3.5, 2.0],
    "snip": [1.5, 4.0, 4.0],
    "taylor": [1.25, 10.0, 16.0],
    "greedy_movement": [-1.5, -2.0, 4.0],
    "snip_momentum": [0.9 * 0.5 + 1, 0.9 * 1 + 3, 0.9 * 4],
}


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize("name", SUMS)
def test_sums_by_hand(name, chunk, monkeypatch):
    monkeypatch.setattr(numerics, "CPU_CHUNK", 2 * chunk)
    criterion = CRITERIA[name]()
    stat = GradientStatistic(WEIGHTS[0], criterion.decay)
    for weight, gradient in zip(WEIGHTS, GRADIENTS):
        before = weight.clone(), gradient.clone()
        stat.observe(weight, gradient, criterion.saliency)
        assert torch.equal(weight, before[0]) and torch.equal(gradient, before[1])
    assert stat.total.tolist() == pytest.approx(SUMS[name]) and stat.count == 2
    assert criterion.score(WEIGHTS[1], stat.total).tolist() == pytest.approx(SUMS[name])


def test_restart_keeps_the_sum_until_the_next_observation():
    saliency = CRITERIA["snip"]().saliency
    stat = GradientStatistic(WEIGHTS[0])
    stat.observe(WEIGHTS[0], GRADIENTS[0], saliency)
    stat.restart()
    assert stat.total.tolist() == [0.5, 1.0, 4.0] and stat.count == 1
    stat.observe(WEIGHTS[1], GRADIENTS[1], saliency)
    assert stat.total.tolist() == [1.0, 3.0, 0.0] and stat.count == 1
    stat.observe(WEIGHTS[1], GRADIENTS[1], saliency)
    assert stat.total.tolist() == [2.0, 6.0, 0.0] and stat.count == 2


def test_state_round_trip_of_a_sum_that_restarts():
    saliency = CRITERIA["snip"]().saliency
    stat = GradientStatistic(WEIGHTS[0])
    stat.observe(WEIGHTS[0], GRADIENTS[0], saliency)
    stat.restart()
    other = GradientStatistic(WEIGHTS[0])
    other.restore(*stat.state())
    assert torch.equal(other.total, stat.total) and other.state()[1] == {"count": 1, "stale": 1}
    for statistic in (stat, other):
        statistic.observe(WEIGHTS[1], GRADIENTS[1], saliency)
    assert torch.equal(other.total, stat.total)
    other.total.zero_()
    assert stat.total.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_layout_is_summed_in_float32(dtype):
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    gradient = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    stat = GradientStatistic(weight)
    stat.observe(weight, gradient, CRITERIA["snip"]().saliency)
    assert stat.total.dtype == torch.float32 and stat.total.shape == weight.shape
    assert torch.equal(stat.total, (weight.float() * gradient.float()).abs())


def test_all_finite():
    huge = torch.full((4,), 3e38)
    assert all_finite([]) and all_finite([torch.ones(3), huge])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([huge, torch.tensor([1.0, bad])])
    assert not all_finite([torch.tensor([float("inf"), -float("inf")])])
    assert all_finite([torch.full((100,), 6e4, dtype=torch.float16)])
