"""Each penalty against its formula, its gradient against autograd, and the schedule of its strength."""

import math

import pytest
import torch

from hf_sparse.penalties import PENALTIES
from hf_sparse.penalties.group_lasso import GroupLasso
from hf_sparse.penalties.l1 import L1


@pytest.mark.parametrize("name", PENALTIES.names())
def test_the_gradient_of_a_unit_is_that_of_its_value(name):
    penalty = PENALTIES.create(name)
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(penalty.value(weight.norm(dim=1), 7).sum(), weight)
    factors = penalty.coefficients(weight.detach().norm(dim=1), 7)
    torch.testing.assert_close(factors[:, None] * weight.detach(), expected)


@pytest.mark.parametrize("name", PENALTIES.names())
def test_units_that_are_zero_or_tiny_get_finite_gradients(name):
    norms = torch.tensor([0.0, 1e-45, 1e-30, 1.0])
    factors = PENALTIES.create(name).coefficients(norms, 4)
    assert factors[0] == 0 and factors.isfinite().all() and (factors * norms <= 2.001).all()


def test_values():
    norms = torch.tensor([3.0, 0.5])
    assert GroupLasso().value(norms, 9).sum() == 3 * 3.5
    assert L1().value(norms, 9).sum() == 3.5


def test_strength_over_the_steps():
    def strengths(**options):
        penalty = L1(strength=2.0, **options)
        return [penalty.strength_at(step, max_steps=8, prune_end=6) for step in range(1, 9)]

    assert strengths() == [2.0] * 6 + [0.0] * 2
    assert strengths(until_prune_end=False) == [2.0] * 8
    assert strengths(warmup=0.5, until_prune_end=False) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert strengths(warmup=2) == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"strength": 0.0}, '"strength" is 0.0: it must be positive'),
        ({"strength": -1.0}, '"strength" is -1.0'),
        ({"strength": math.inf}, '"strength" is inf'),
        ({"strength": math.nan}, '"strength" is nan'),
        ({"warmup": -0.1}, '"warmup" is -0.1: it must be a whole number of steps, or a fraction of training below 1'),
        ({"warmup": 1.5}, '"warmup" is 1.5'),
        ({"warmup": math.inf}, '"warmup" is inf'),
        ({"strong": 1}, 'penalty "l1" has no option "strong": known are strength, warmup, until_prune_end'),
        ({"until_prune_end": 1}, "it must be true or false"),
    ],
)
def test_options_that_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        PENALTIES.create("l1", options)
