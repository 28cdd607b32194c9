"""The laws of a stat: of gradients, under every registered criterion that has one, and of inputs."""

import pytest
import torch

from hf_sparse import Requires
from hf_sparse.criteria import CRITERIA
from hf_sparse.statistics import GradientStatistic, GramMatrix, InputNorms


NAMES = [name for name in CRITERIA.names() if CRITERIA[name].requires & Requires.GRADIENTS]


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


# Ragged batches (B, T, I), each with the tokens that count.
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
def test_batches_one_by_one_are_all_tokens_at_once(kind):
    pairs = batches(0)
    tokens = torch.cat([x[keep] for x, keep in pairs])
    whole = kind(10)
    whole.observe(tokens)
    assert close(observed_inputs(kind, pairs), whole) and whole.count == len(tokens)
    shuffled = kind(10)
    shuffled.observe(tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))])
    assert close(shuffled, whole)


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_merging_two_parts_is_observing_all_inputs(kind):
    pairs = batches(2)
    first, second = observed_inputs(kind, pairs[:2]), observed_inputs(kind, pairs[2:])
    kept, count = second.total.clone(), second.count
    reduced = kind(10)  # what an all-reduce does
    reduced.total.add_(first.total).add_(second.total)
    reduced.count = first.count + second.count
    first.merge(second)
    assert close(first, observed_inputs(kind, pairs)) and close(first, reduced)
    assert torch.equal(second.total, kept) and second.count == count


@pytest.mark.parametrize("kind", [InputNorms, GramMatrix])
def test_what_padding_holds_does_not_matter(kind):
    pairs = batches(3)
    spoilt = [(x.masked_fill(~keep[..., None], float("nan")), keep) for x, keep in pairs]
    assert torch.equal(observed_inputs(kind, pairs).total, observed_inputs(kind, spoilt).total)
