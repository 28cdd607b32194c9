"""The laws of a stat, under every registered criterion that has one."""

import pytest
import torch

from hf_sparse.criteria import CRITERIA
from hf_sparse.stats import GradientStat


NAMES = [name for name in CRITERIA.names() if CRITERIA[name].needs == "gradient"]


def steps(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)) for _ in range(count)]


def observed(criterion, pairs):
    stat = GradientStat(torch.zeros(4, 6), criterion.decay)
    for weight, gradient in pairs:
        stat.observe(weight, gradient, criterion.saliency)
    return stat


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_is_decayed_and_added_step_by_step(name):
    criterion, pairs = CRITERIA[name](), steps(0, 5)
    expected = torch.zeros(4, 6)
    for weight, gradient in pairs:
        expected = criterion.decay * expected + criterion.saliency(weight, gradient, torch.empty(4, 6))
    stat = observed(criterion, pairs)
    assert stat.count == 5 and torch.allclose(stat.total, expected, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if CRITERIA[name].decay == 1])
def test_merging_two_halves_is_observing_the_whole(name):
    criterion, pairs = CRITERIA[name](), steps(1, 6)
    first, second = observed(criterion, pairs[:3]), observed(criterion, pairs[3:])
    kept = second.total.clone()
    first.merge(second)
    whole = observed(criterion, pairs)
    assert first.count == whole.count == 6 and torch.allclose(first.total, whole.total, rtol=1e-5, atol=1e-6)
    assert torch.equal(second.total, kept)
