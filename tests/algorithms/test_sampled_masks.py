"""Learned masks that are sampled: values and gradients against formulas written with loops, in float64."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from hf_sparse.algorithms.gumbel_nm import GumbelNM, candidate_logits
from hf_sparse.algorithms.gumbel_sigmoid import GumbelSigmoid
from hf_sparse.patterns import get_pattern


ROWS, COLUMNS = 3, 8


def context_of(pattern, progress=0.3, step=1, target=0.5):
    def noise(index):
        generator = torch.Generator().manual_seed(1000 * step + index)
        return torch.rand(ROWS, 1, COLUMNS, generator=generator).clamp(1e-6, 1 - 1e-6)

    return SimpleNamespace(
        pattern=get_pattern(pattern), progress=progress, step=step, target=target, noise=noise, totals=None
    )


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, 1, COLUMNS, dtype=torch.float64, generator=generator)


def first_mask(algorithm, pattern, seed=1):
    keep, of = get_pattern(pattern).n_of_m
    scores = weights(seed).view(-1, of)
    chosen = scores.topk(keep or COLUMNS // 2, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True).view(ROWS, 1, COLUMNS)


def nm_reference(logits_GK, dense, uniform_by_group, kappa, tau, keep, of):
    """The weight from the logits of each group, group by group and mask by mask."""
    out = []
    for group, values in enumerate(dense.reshape(-1, of)):
        terms = []
        for index, kept in enumerate(itertools.combinations(range(of), keep)):
            gumbel = -math.log(-math.log(uniform_by_group[group][index]))
            terms.append((kept, torch.exp((kappa * logits_GK[group, index] + gumbel) / tau)))
        total = sum(term for _, term in terms)
        mask = [sum(term for kept, term in terms if index in kept) / total for index in range(of)]
        out.append(torch.stack([value * share for value, share in zip(values, mask, strict=True)]))
    return torch.cat(out).view(dense.shape)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_gumbel_nm_is_the_mean_of_all_masks_weighted_by_a_relaxed_sample(pattern):
    algorithm, context, dense = GumbelNM(norm_weight=0.1), context_of(pattern), weights()
    keep, of = context.pattern.n_of_m
    theta = algorithm.init(dense, first_mask(algorithm, pattern), context)
    theta = {name: value + 0.1 * weights(seed) for seed, (name, value) in enumerate(theta.items(), 5)}
    gradient = weights(3)
    got, of_weight = algorithm.pull_back(theta, dense, first_mask(algorithm, pattern), gradient.clone(), context)
    assert of_weight is None

    # The logits of a group lie in its M positions of the first tensor, then of the second.
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    stacked = torch.cat([value.reshape(-1, of) for value in leaves.values()], dim=1)
    uniform = [context.noise(index).double().view(-1, of) for index in range(len(theta))]
    uniform = torch.cat(uniform, dim=1).tolist()
    kappa, tau = 1 + 0.3 * (5 - 1), 4 + 0.3 * (0.05 - 4)
    expected = nm_reference(stacked, dense, uniform, kappa, tau, keep, of)
    torch.testing.assert_close(algorithm.weight(theta, dense, None, context), expected.detach())
    loss = (gradient * expected).sum() - 0.1 * expected.square().sum()
    for name, reference in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(got[name], reference)


def test_gumbel_nm_starts_at_its_prior_and_ends_at_the_most_likely_mask():
    algorithm, context, dense = GumbelNM(), context_of("2:4"), weights()
    mask = first_mask(algorithm, "2:4")
    theta = algorithm.init(dense, mask, context)
    # Drawn by hand: the overlap of two masks that keep 2 of 4 is 0, 1 or 2, on average 1.
    logits = candidate_logits(theta, context.pattern)
    assert sorted(logits[0, 0, 0].tolist()) == [-3, 0, 0, 0, 0, 3]
    assert torch.equal(algorithm.scores(theta, dense, context) == 1, mask)
    theta["logits00"].view(-1, 4)[0] = torch.tensor([9.0, 0, 0, 0])  # 1100
    assert algorithm.scores(theta, dense, context).view(-1, 4)[0].tolist() == [1, 1, 0, 0]


def test_samples_become_hard_at_the_end():
    for algorithm, pattern in (
        (GumbelNM(temperature_end=1e-4), "2:4"),
        (GumbelSigmoid(temperature_end=1e-4), "unstructured"),
    ):
        context, dense = context_of(pattern, progress=1.0), torch.ones(ROWS, 1, COLUMNS, dtype=torch.float64)
        theta = algorithm.init(dense, first_mask(algorithm, "2:4"), context)
        sample = algorithm.weight(theta, dense, None, context)
        torch.testing.assert_close(sample, sample.round(), atol=1e-6, rtol=0)
    # Samples follow the distribution: kappa l = 15 is certain, and noise decides between equal logits.
    equal = {"logits00": torch.zeros_like(dense), "logits01": torch.zeros_like(dense)}
    samples = [
        GumbelNM(temperature_end=1e-4).weight(equal, dense, None, context_of("2:4", 1.0, step))
        for step in range(1, 40)
    ]
    assert (torch.stack(samples).mean(0) - 0.5).abs().max() < 0.35
    assert all(bool((sample.view(-1, 4).sum(1).round() == 2).all()) for sample in samples)


def test_gumbel_sigmoid_and_its_density_term():
    algorithm, dense = GumbelSigmoid(density_weight=0.2, norm_weight=0.1), weights()
    context = context_of("unstructured", target=0.75)
    theta = {"logits": weights(4)}
    mask = torch.ones_like(dense, dtype=torch.bool)
    context.totals = algorithm.totals(theta, dense, mask, context)
    gradient = weights(3)
    got, _ = algorithm.pull_back(theta, dense, mask, gradient.clone(), context)

    logits = theta["logits"].clone().requires_grad_()
    uniform, kappa, tau = context.noise(0).double(), 1 + 0.3 * 4, 4 + 0.3 * (0.05 - 4)
    weight = dense * torch.sigmoid((kappa * logits + torch.log(uniform / (1 - uniform))) / tau)
    density = torch.sigmoid(kappa * logits).mean()
    loss = (gradient * weight).sum() - 0.1 * weight.square().sum() + 0.2 * dense.numel() * (density - 0.25) ** 2
    torch.testing.assert_close(algorithm.weight(theta, dense, mask, context), weight.detach())
    torch.testing.assert_close(got["logits"], torch.autograd.grad(loss, logits)[0], atol=1e-6, rtol=1e-5)
    # Whole numbers: the sums over parts are those of the whole.
    parts = [algorithm.totals({"logits": part}, part, mask, context) for part in theta["logits"].split(1)]
    assert torch.equal(sum(parts), context.totals)


def test_the_density_term_alone_reaches_the_target():
    algorithm, dense, context = GumbelSigmoid(), weights(), context_of("unstructured", target=0.75)
    theta = {"logits": weights(4).requires_grad_()}
    optimizer = torch.optim.Adam(theta.values(), lr=0.05)
    for _ in range(200):
        context.totals = algorithm.totals(theta, dense, None, context)
        grads, _ = algorithm.pull_back(theta, dense, None, torch.zeros_like(dense), context)
        theta["logits"].grad = grads["logits"]
        optimizer.step()
    assert float(algorithm.density(context)) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("algorithm", "options", "pattern", "words"),
    [
        (GumbelNM(), "gumbel_nm", "unstructured", 'pattern="2:4"'),
        (GumbelNM(), "gumbel_nm", "8:16", "12,870 masks"),
        (GumbelSigmoid(), "gumbel_sigmoid", "2:4", 'algorithm="gumbel_nm"'),
        (GumbelSigmoid(), "gumbel_sigmoid", "4x1", "single weights"),
    ],
)
def test_patterns_that_do_not_fit_are_named(algorithm, options, pattern, words):
    given = SimpleNamespace(algorithm=options, keep_zeros=False)
    (error,) = algorithm.option_errors(given, get_pattern(pattern))
    assert words in error
    assert f'"{options}"' in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature_end": 5.0}, "swap them"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0"),
        ({"scale_end": math.nan}, "`scale_end` is nan"),
        ({"prior": ""}, "`prior` is empty"),
        ({"norm_weight": -1.0}, "0 or more"),
    ],
)
def test_invalid_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        GumbelNM(**options)
