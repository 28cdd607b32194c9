"""Prune steps of a group: kept zeros, regrowth, and refused input. Masks are counted, or drawn by hand."""

import logging

import numpy as np
import pytest
import torch
from helpers.mixed import NAMES, Mixed
from torch import nn

from hf_sparse import Pruner, PruningConfig


def linear(rows, dtype=torch.float32):
    weight = torch.tensor(rows, dtype=dtype)
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def drawn(pruner):
    return ["".join("#" if kept else "." for kept in row) for row in pruner.masks["0.weight"]]


def magnitude(**options):
    return PruningConfig(criterion="magnitude", **options)


def granet(fraction, **options):
    """As the option `regrow` of earlier versions."""
    return magnitude(algorithm="granet", algorithm_kwargs={"fraction": fraction, "decay": "linear"}, **options)


# Kept zeros


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_locked_zeros_count_towards_the_target(scope):
    model = linear([[0.0, 4, 3, 2], [5, 0, 7, -0.0]])
    pruner = Pruner(model, magnitude(target_sparsity=0.5, scope=scope, keep_zeros=True))
    assert drawn(pruner) == [".###", "#.#."]
    assert pruner.update(1, 2).zeros == round(0.4375 * 8)  # cubic at 1/2 is 7/8 of the target
    assert pruner.update(2, 2).zeros == 4 and drawn(pruner) == [".##.", "#.#."]


def test_more_zeros_than_the_target_stay():
    model = linear([[0.0, 0, 0, 2], [5, 0, 7, 1]])
    pruner = Pruner(model, magnitude(target_sparsity=0.25, keep_zeros=True))
    with torch.no_grad():
        model[0].weight.add_(1)
    assert pruner.update(1, 1).zeros == 4
    assert model[0].weight.tolist() == [[0, 0, 0, 3], [6, 0, 8, 2]]


def test_keeping_zeros_alone_prunes_nothing_else():
    model = linear([[0.0, 0, 0, 2], [5, 0, 7, 1]])
    pruner = Pruner(model, PruningConfig(keep_zeros=True))
    assert not pruner.observes and pruner.update(1, 1).zeros == 4 and pruner.target == 0


def test_the_floor_of_a_layer_holds_where_another_exceeds_the_target():
    """The first layer's locked zeros alone are more than the target; the floor of the second is still 1/4."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
    config = magnitude(target_sparsity=0.5, min_sparsity_per_layer=0.25, keep_zeros=True, scope="layer")
    assert [layer.zeros for layer in Pruner(model, config).update(1, 1).layers] == [16, 2]


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_locked_zeros_under_n_of_m(scope):
    """Groups of two zeros or more are not pruned; the others are pruned to two."""
    model = linear([[0.0, 0, 0, 1, 9, 0, 8, 7], [0, 0, 0, 0, 0, 1, 0, 2], [6, 5, 4, 3, 0, 0, 0, 1]])
    pruner = Pruner(model, PruningConfig(pattern="2:4", criterion="magnitude", scope=scope, keep_zeros=True))
    assert pruner.update(1, 4).zeros == 13
    assert [pruner.update(step, 4).zeros for step in (2, 3, 4)][-1] == 16
    assert drawn(pruner) == ["...##.#.", ".....#.#", "##.....#"]


def test_locked_zeros_within_blocks():
    """A block with some zeros keeps them and competes with the rest; only a block of zeros is pruned."""
    model = linear([[0.0, 9, 8, 0], [0, 1, 8, 3], [7, 0, 1, 1], [7, 6, 1, 1]])
    pruner = Pruner(model, magnitude(target_sparsity=0.5, pattern="2x1", keep_zeros=True))
    assert drawn(pruner) == [".##.", ".###", "#.##", "####"]
    pruner.update(1, 1)  # means 0 5 8 1.5 over 7 3 1 1: four of eight are pruned
    assert drawn(pruner) == [".##.", ".##.", "#...", "##.."]


# Regrowth


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_regrowth_keeps_the_count_and_restores_the_largest_gradients(pattern, scope):
    target = 0.5
    options = {"pattern": pattern, "scope": scope, "sparsity_decay_type": "linear"}
    model = Mixed()
    pruner = Pruner(model, granet(target_sparsity=target, fraction=1.0, **options))
    unit = 4 if pattern == "4x1" else 1
    grown_at = []
    for step in range(1, 6):
        model.fake_gradients(step)
        before = {name: pruner.masks[name] for name in NAMES}
        pruner.update(step, 5)
        after = {name: pruner.masks[name] for name in NAMES}
        pruned = sum(int((~mask).sum()) for mask in after.values())
        assert pruned == unit * round(target * step / 5 * 448 / unit)
        grown = {name: after[name] & ~before[name] for name in NAMES}
        grown_at.append(sum(int(mask.sum()) for mask in grown.values()))
        if pattern == "unstructured":
            for names in [NAMES] if scope == "global" else [[name] for name in NAMES]:
                grad = {name: pruner.parameters[name].grad.abs() for name in names}
                taken = torch.cat([grad[name][grown[name]] for name in names])
                left = torch.cat([grad[name][~after[name]] for name in names])
                assert not len(taken) or taken.min() >= left.max()
        if pattern == "2:4":
            assert (after["linear.weight"].view(-1, 4).sum(1) >= 2).all()
    assert sum(grown_at) > 0 and grown_at[-1] == 0


def test_regrowth_by_hand():
    """Step 1 of 2 asks for 2 of 8 and exchanges half (0.5·6 = 3): the five lowest are pruned, and of those the three
    with the largest gradients are restored."""
    model = linear([[1.0, 2, 3, 4, 5, 6, 7, 8]])
    config = granet(target_sparsity=0.5, fraction=1.0, sparsity_decay_type="linear")
    pruner = Pruner(model, config)
    model[0].weight.grad = torch.tensor([[9.0, -1, 5, 0, -7, 8, 8, 8]])
    pruner.update(1, 2)
    assert drawn(pruner) == ["#.#.####"]
    model[0].weight.grad = None
    pruner.update(2, 2)
    assert drawn(pruner) == ["....####"]


def test_without_finite_gradients_nothing_is_restored_and_a_warning_is_logged(caplog):
    model = linear([[1.0, 2, 3, 4]])
    pruner = Pruner(model, granet(target_sparsity=0.5, fraction=0.5, sparsity_decay_type="linear"))
    for gradient in (None, torch.tensor([[1.0, float("inf"), 1, 1]])):
        model[0].weight.grad = gradient
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert pruner.update(1, 2).zeros == 1
        assert "exchanges nothing at this prune step: no finite gradients" in caplog.text


# Invalid and missing values


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x2"])
def test_nan_weights_are_refused_by_name(pattern, scope):
    model = Mixed()
    with torch.no_grad():
        model.experts.up[1, 2, 3] = float("nan")
    target = None if pattern == "2:4" else 0.5
    groups = {"all": {"targets": ["*"]}}
    pruner = Pruner(model, magnitude(target_sparsity=target, pattern=pattern, scope=scope, groups=groups))
    with pytest.raises(ValueError, match='group "all", criterion "magnitude": scores are nan in "experts.up"'):
        for step in (1, 2, 3):
            pruner.update(step, 3)


def test_a_nan_that_is_pruned_is_a_zero():
    model = linear([[1.0, 2, 3, 4]])
    pruner = Pruner(model, magnitude(target_sparsity=0.5))
    pruner.update(1, 2)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    assert pruner.update(2, 2).zeros == 2 and model[0].weight.tolist() == [[0, 0, 3, 4]]


def test_a_group_without_finite_gradients_cannot_reach_its_target(caplog):
    pruner = Pruner(Mixed(), PruningConfig(target_sparsity=0.5, criterion="snip"))
    with caplog.at_level(logging.WARNING):
        assert pruner.update(1, 2).zeros == 0
    assert 'prune step 1 of 2 is skipped for group "weights": no finite gradient has been observed yet' in caplog.text
    with pytest.raises(RuntimeError, match='group "weights" cannot reach its target: criterion "snip" has observed'):
        pruner.update(2, 2)


def test_the_last_sums_still_rank_when_all_later_gradients_overflow():
    model = linear([[4.0, 3, 2, 1]])
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="gradient", sparsity_decay_type="linear"))
    model[0].weight.grad = torch.tensor([[1.0, 2, 3, 4]])
    assert pruner.observe()
    pruner.update(1, 2)
    model[0].weight.grad = torch.full((1, 4), float("inf"))
    assert not pruner.observe()
    pruner.update(2, 2)
    assert drawn(pruner) == ["..##"]


def test_weights_without_gradients_are_pruned_first():
    """With scope global, weights that never had a gradient are pruned first."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="snip", max_sparsity_per_layer=1.0))
    model[0].weight.grad = torch.ones(4, 4)
    assert pruner.observe()
    assert [layer.zeros for layer in pruner.update(1, 1).layers] == [0, 16]


def test_movement_and_snip_momentum_by_hand():
    """Two steps of weights 4, -3, 2, -1. movement sums -w·g over both and keeps it after the first prune step;
    snip_momentum is 0.9·|w·g| + |w·g|."""
    gradients = [torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[-1.0, 1, -2, 3]])]
    sums = {"greedy_movement": [-4 + 4, 3 + 3, -2 + 4, 1 + 3], "snip_momentum": [3.6 + 4, 2.7 + 3, 1.8 + 4, 0.9 + 3]}
    for criterion, expected in sums.items():
        model = linear([[4.0, -3, 2, -1]])
        pruner = Pruner(model, PruningConfig(target_sparsity=0.25, criterion=criterion, sparsity_decay_type="cube"))
        for step, gradient in enumerate(gradients, start=1):
            model[0].weight.grad = gradient
            pruner.observe()
            if step == 1:
                assert pruner.update(1, 2).zeros == 0
        assert pruner.groups[0].statistics["0.weight"].total.tolist()[0] == pytest.approx(expected)
        pruner.update(2, 2)
        assert drawn(pruner) == [".###" if criterion == "greedy_movement" else "###."]


def test_groups_with_their_own_patterns_at_once():
    model = Mixed()
    groups = {
        "attention": {"targets": ["linear", "conv1d"], "pattern": "4x1", "target_sparsity": 0.75},
        "ffn": {"targets": ["experts.up", "transposed.up"], "pattern": "2:4"},
        "rest": {"targets": ["conv2d"], "pattern": "channel", "scope": "layer"},
    }
    pruner = Pruner(model, magnitude(target_sparsity=0.5, groups=groups))
    for step in range(1, 4):
        report = pruner.update(step, 3)
    zeros = {group: sum(layer.zeros for layer in report.layers if layer.group == group) for group in groups}
    assert zeros == {"attention": 0.75 * 224, "ffn": 64, "rest": 48}
    blocks = np.asarray(pruner.masks["conv1d.weight"]).T.reshape(3, 4, 8).sum(1)
    assert np.isin(blocks, (0, 4)).all()
    assert (pruner.masks["experts.up"].view(-1, 4).sum(1) == 2).all()
    assert pruner.target == pytest.approx((0.75 * 224 + 64 + 48) / 448)


def test_weights_that_the_loss_does_not_depend_on_are_named(caplog):
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="snip", max_sparsity_per_layer=1.0))
    model["used"](torch.ones(1, 4)).sum().backward()
    pruner.observe()
    with caplog.at_level("WARNING"):
        pruner.update(1, 2)
        pruner.update(2, 2)
    unreached, emptied = [record.message for record in caplog.records]
    assert unreached == (
        'the loss does not depend on 1 selected weight, so criterion "snip" prunes it first: idle.weight. Exclude '
        'what the model needs, as with exclude=["idle"].'
    )
    assert "1 layer: " in emptied and '"idle.weight" (0 of 16)' in emptied
    assert pruner.masks.pruned("idle.weight") == 16
