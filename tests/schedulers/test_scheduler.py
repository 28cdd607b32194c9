"""The seed's scheduler API. Expected ratios are worked out by hand from the formulas in the module's docstrings."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_sparse import Pruner, PruningConfig, PruningConfigError
from hf_sparse.schedulers import (
    CURVES,
    IterativeScheduler,
    OneshotScheduler,
    Scheduler,
    get_scheduler,
    register_curve,
    register_scheduler,
)


# Steps 1 to 4 of 4. With A = 0.8: 0.2^(1/4) = 0.668740, cos(22.5°) = 0.923880. With A = 0.6: 0.4^(1/4) = 0.795271.
GOLDEN = {
    ("linear", 0.8): [0.2, 0.4, 0.6, 0.8],
    ("exp", 0.8): [0.331260, 0.552786, 0.700930, 0.8],
    ("cos", 0.8): [0.060896, 0.234315, 0.493853, 0.8],
    ("cube", 0.8): [0.0125, 0.1, 0.3375, 0.8],
    ("cubic", 0.8): [0.4625, 0.7, 0.7875, 0.8],
    ("linear", 0.6): [0.15, 0.3, 0.45, 0.6],
    ("exp", 0.6): [0.204729, 0.367544, 0.497027, 0.6],
    ("cos", 0.6): [0.045672, 0.175736, 0.370390, 0.6],
    ("cube", 0.6): [0.009375, 0.075, 0.253125, 0.6],
    ("cubic", 0.6): [0.346875, 0.525, 0.590625, 0.6],
}


@dataclasses.dataclass
class Settings:
    sparsity_decay_type: str
    max_sparsity_ratio_per_op: float | None = None


@pytest.mark.parametrize("decay, target", GOLDEN)
def test_golden_values(decay, target):
    scheduler = IterativeScheduler({"sparsity_decay_type": decay})
    found = [scheduler.update_sparsity_ratio(target, step, 4, {}) for step in (1, 2, 3, 4)]
    assert found == pytest.approx(GOLDEN[decay, target], abs=1e-6)
    assert found[3] == target


@pytest.mark.parametrize("decay, target", [key for key in GOLDEN if key[1] == 0.6])
@pytest.mark.parametrize("name", ["max_sparsity_ratio_per_op", "max_sparsity_per_layer"])
def test_a_cap_takes_the_place_of_a_larger_target(decay, target, name):
    scheduler = IterativeScheduler({"sparsity_decay_type": decay, name: 0.6})
    found = [scheduler.update_sparsity_ratio(0.8, step, 4, {}) for step in (1, 2, 3, 4)]
    assert found == pytest.approx(GOLDEN[decay, target], abs=1e-6)
    assert scheduler.update_sparsity_ratio(0.3, 4, 4, {}) == 0.3


@pytest.mark.parametrize(
    "config",
    [
        {"sparsity_decay_type": "cube", "max_sparsity_ratio_per_op": None},
        Settings("cube"),
        SimpleNamespace(sparsity_decay_type="cube"),
        PruningConfig(target_sparsity=0.8, sparsity_decay_type="cube"),
    ],
    ids=["mapping", "dataclass", "namespace", "PruningConfig"],
)
def test_config_may_be_a_mapping_or_any_object(config):
    assert IterativeScheduler(config).update_sparsity_ratio(0.8, 2, 4, {}) == pytest.approx(0.1)


def test_an_empty_config_means_the_defaults():
    for config in ({}, SimpleNamespace(), None):
        assert IterativeScheduler(config).update_sparsity_ratio(0.8, 1, 4, {}) == pytest.approx(0.4625)


def test_positional_and_keyword_calls():
    masks = {"weight": torch.ones(2, 2, dtype=torch.bool)}
    rest = {"current_prune_step": 2, "total_prune_steps": 4, "masks": masks}
    linear = IterativeScheduler({"sparsity_decay_type": "linear"})
    assert linear.update_sparsity_ratio(0.8, 2, 4, masks) == pytest.approx(0.4)
    assert linear.update_sparsity_ratio(target_ratio=0.8, **rest) == pytest.approx(0.4)
    assert OneshotScheduler({}).update_sparsity_ratio(0.8, 2, 4, masks) == 0.8
    assert OneshotScheduler({}).update_sparsity_ratio(aggressive_ratio=0.8, **rest) == 0.8
    with pytest.raises(TypeError, match="abstract"):
        Scheduler({})


def test_beyond_the_last_step_it_stays_at_the_target():
    for config in ({"sparsity_decay_type": decay} for decay, target in GOLDEN if target == 0.8):
        assert IterativeScheduler(config).update_sparsity_ratio(0.8, 7, 4, {}) == 0.8


def test_initial_sparsity_is_where_the_curve_starts():
    """Halfway from 0.5 to 0.75: 0.5 + 0.5·linear(1/2, 0.5) = 0.625."""
    scheduler = IterativeScheduler({"sparsity_decay_type": "linear", "initial_sparsity": 0.5})
    assert [scheduler.update_sparsity_ratio(0.75, step, 2, {}) for step in (0, 1, 2)] == [0.5, 0.625, 0.75]
    assert scheduler.update_sparsity_ratio(0.25, 1, 2, {}) == 0.25
    assert IterativeScheduler({"initial_sparsity": 1.0}).update_sparsity_ratio(1.0, 1, 2, {}) == 1.0


def test_errors_say_what_is_wrong():
    known = "known are cos, cube, cubic, exp, linear"
    with pytest.raises(ValueError, match=f'unknown sparsity_decay_type "cubik": {known}.* Did you mean "cubic"?'):
        IterativeScheduler({"sparsity_decay_type": "cubik"})
    for scheduler in (IterativeScheduler({}), OneshotScheduler({})):
        with pytest.raises(ValueError, match="`total_prune_steps` is 0: it must be at least 1"):
            scheduler.update_sparsity_ratio(0.8, 0, 0, {})
        with pytest.raises(ValueError, match="`current_prune_step` is -1"):
            scheduler.update_sparsity_ratio(0.8, -1, 4, {})


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, IterativeScheduler),
        ({"scheduler": "oneshot", "prune_start": 1, "prune_end": 9}, OneshotScheduler),
        ({"scheduler": "iterative", "prune_start": 5, "prune_end": 5}, IterativeScheduler),
        ({"scheduler": None, "prune_start": 5, "prune_end": 5}, OneshotScheduler),
        ({"prune_start": 0.0, "prune_end": 0}, OneshotScheduler),
        ({"start_step": 5, "end_step": 5}, OneshotScheduler),
        ({"start_step": 0, "end_step": 5}, IterativeScheduler),
        (SimpleNamespace(start_step=3, end_step=3), OneshotScheduler),
        (PruningConfig(target_sparsity=0.5, prune_start=3, prune_end=3), OneshotScheduler),
        (PruningConfig(target_sparsity=0.5), IterativeScheduler),
    ],
)
def test_get_scheduler_goes_by_name_else_by_the_steps(config, expected):
    assert type(get_scheduler(config)) is expected


def test_get_scheduler_refuses_an_unknown_name():
    with pytest.raises(ValueError, match='"onehot": known are .*iterative, oneshot.* Did you mean "oneshot"?'):
        get_scheduler({"scheduler": "onehot"})


def register_two_halves():
    @register_scheduler("two_halves")
    class TwoHalves(Scheduler):
        def update_sparsity_ratio(self, target_ratio, current_prune_step, total_prune_steps, masks):
            assert set(masks) == {"weight"} and masks["weight"].dtype == torch.bool
            return target_ratio if current_prune_step == total_prune_steps else target_ratio / 2

    return TwoHalves


def test_a_users_scheduler_is_selected_by_name():
    two_halves = register_two_halves()
    config = PruningConfig(target_sparsity=0.5, scheduler="two_halves", criterion="magnitude")
    assert type(get_scheduler(config)) is two_halves
    pruner = Pruner(nn.Linear(8, 4), config)
    assert [pruner.update(step, 3).sparsity for step in (1, 2, 3)] == [0.25, 0.25, 0.5]
    with pytest.raises(PruningConfigError, match='`scheduler` is "two_half": known are .*Did you mean "two_halves"?'):
        PruningConfig(scheduler="two_half")


@pytest.mark.parametrize("curve", [lambda t: t, lambda t, target, power: t**power, lambda *, t, target: t, 0.5])
def test_a_curve_of_another_signature_is_refused_when_it_is_registered(curve):
    with pytest.raises(TypeError, match=r'curve "bent" is called as curve\(t, target\), but .* cannot be .*def curve'):
        register_curve("bent")(curve)
    assert "bent" not in CURVES


def test_duplicates_are_refused():
    two_halves = register_two_halves()
    assert register_scheduler("two_halves")(two_halves) is two_halves
    with pytest.raises(
        ValueError, match='scheduler "two_halves" is already registered, by .*TwoHalves: choose another'
    ):
        register_scheduler("two_halves")(OneshotScheduler)


@pytest.mark.parametrize("ratio", [0.9, -0.1, float("nan")])
def test_a_scheduler_that_leaves_its_range_is_refused(ratio):
    @register_scheduler("wild")
    class Wild(Scheduler):
        def update_sparsity_ratio(self, target_ratio, current_prune_step, total_prune_steps, masks):
            return ratio

    config = PruningConfig(target_sparsity=0.5, scheduler="wild", criterion="magnitude")
    pruner = Pruner(nn.Linear(8, 4), config)
    with pytest.raises(ValueError, match=f"Wild returns sparsity {ratio} at prune step 1 of 2.*the target, 0.5"):
        pruner.update(1, 2)
