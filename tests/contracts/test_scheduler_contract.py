"""The contract of every registered scheduler and curve."""

import copy

import pytest
import torch

from hf_sparse.schedulers import CURVES, SCHEDULERS


TARGETS = (0.0, 0.1, 0.5, 0.8, 0.999, 1.0)
SCHEDULES = [(name, decay) for name in SCHEDULERS.names() for decay in CURVES.names()]


@pytest.mark.parametrize("name", CURVES.names())
def test_a_curve_rises_from_zero_to_its_target(name):
    curve = CURVES[name]
    for target in TARGETS:
        values = [curve(step / 50, target) for step in range(51)]
        assert values[0] == 0 and values[50] == pytest.approx(target, abs=1e-12)
        assert all(before <= after + 1e-12 for before, after in zip(values, values[1:]))
        assert values == [curve(step / 50, target) for step in range(51)]


@pytest.mark.parametrize("initial", [0.0, 0.3])
@pytest.mark.parametrize("name, decay", SCHEDULES)
def test_a_scheduler_rises_to_exactly_its_target(name, decay, initial):
    config = {"sparsity_decay_type": decay, "initial_sparsity": initial}
    given, masks = copy.deepcopy(config), {"weight": torch.ones(3, 2, dtype=torch.bool)}
    scheduler = SCHEDULERS[name](config)
    for target in TARGETS:
        for total in (1, 2, 7, 100):
            forwards = [scheduler.update_sparsity_ratio(target, step, total, masks) for step in range(total + 3)]
            assert forwards[total:] == [target] * 3
            assert all(0 <= before <= after <= target for before, after in zip(forwards, forwards[1:]))
            assert forwards[1] == target or not scheduler.reaches_target_at_once
            fresh = SCHEDULERS[name](config)
            backwards = [
                fresh.update_sparsity_ratio(target, step, total, masks) for step in reversed(range(total + 3))
            ]
            assert backwards[::-1] == forwards
    assert config == given and masks["weight"].all()
