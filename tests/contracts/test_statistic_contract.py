"""The contract of statistics: of gradients, under every registered criterion that has one, and of inputs."""

import pytest
import torch

from hf_sparse.criteria import CRITERIA, GradientCriterion
from hf_sparse.statistics import GradientStatistic, GramMatrix, InputNorms


NAMES = [name for name in CRITERIA.names() if issubclass(CRITERIA[name], GradientCriterion)]


def steps(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)) for _ in range(count)]


def observed(criterion, pairs):
    stat = GradientStatistic(torch.zeros(4, 6), criterion.decay)
    for weight, gradient in pairs:
        stat.observe(weight, gradient, criterion.saliency)
    return stat


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_is_decayed_and_added_step_by_step(name):
    criterion, pairs = CRITERIA.create(name), steps(0, 5)
    expected = torch.zeros(4, 6)
    for weight, gradient in pairs:
        expected = criterion.decay * expected + criterion.saliency(weight, gradient, torch.empty(4, 6))
    stat = observed(criterion, pairs)
    assert stat.count == 5 and torch.allclose(stat.total, expected, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if CRITERIA[name].decay == 1])
def test_sums_of_two_halves_add_up_to_the_whole(name):
    criterion, pairs = CRITERIA.create(name), steps(1, 6)
    first, second = observed(criterion, pairs[:3]), observed(criterion, pairs[3:])
    whole = observed(criterion, pairs)
    assert first.count + second.count == whole.count == 6
    assert torch.allclose(first.total + second.total, whole.total, rtol=1e-5, atol=1e-6)


# Ragged batches (B, T, I), each with a mask of the tokens to keep.
def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 9), (1, 5), (3, 1), (2, 12)]
    inputs = [torch.randn(*size, 10, generator=generator) for size in sizes]
    return [(x, torch.rand(x.shape[:2], generator=generator) < 0.7) for x in inputs]


def observed_inputs(kind, pairs):
    stat = kind(10)
    for x, keep in pairs:
        stat.observe(x, keep)
    return stat


def close(first, second):
    return first.count == second.count and torch.allclose(first.total, second.total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_batches_in_any_order_give_the_sums_of_all_tokens(kind):
    pairs = batches(0)
    tokens = torch.cat([x[keep] for x, keep in pairs])
    whole = kind(10)
    whole.observe(tokens)
    assert close(observed_inputs(kind, pairs), whole) and whole.count == len(tokens)
    shuffled = kind(10)
    shuffled.observe(tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))])
    assert close(shuffled, whole)


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_sums_of_two_ranks_add_up_to_those_of_all_inputs(kind):
    pairs = batches(2)
    first, second = observed_inputs(kind, pairs[:2]), observed_inputs(kind, pairs[2:])
    first.total += second.total  # as an all-reduce does
    first.count += second.count
    assert close(first, observed_inputs(kind, pairs))


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_values_of_padding_do_not_matter(kind):
    pairs = batches(3)
    spoilt = [(x.masked_fill(~keep[..., None], float("nan")), keep) for x, keep in pairs]
    assert torch.equal(observed_inputs(kind, pairs).total, observed_inputs(kind, spoilt).total)
