"""Every criterion with every pattern, scope and allocation, on every kind of weight, against the definition."""

import itertools

import numpy as np
import pytest
import torch
from helpers.mixed import NAMES, Mixed, lowest, scores, units

from hf_sparse import Pruner, PruningConfig, Requires
from hf_sparse.allocations import ALLOCATIONS
from hf_sparse.criteria import CRITERIA


PATTERNS = ["unstructured", "2:4", "1:4", "4x1", "2x2", "channel", "channel:in"]
CHANNELS = ["channel", "channel:in"]
TARGET = {"2:4": 0.5, "1:4": 0.75}
STEPS = 5
CRITERIA_OF_TRAINING = [name for name in CRITERIA.names() if not CRITERIA[name].requires & Requires.INPUTS]
ALLOCATIONS_OF_TRAINING = [name for name in ALLOCATIONS.names() if not ALLOCATIONS[name].requires & Requires.INPUTS]
COMBINATIONS = [
    (pattern, scope, allocation, criterion)
    for pattern in PATTERNS
    for scope in ("row", "layer", "global")
    for criterion in CRITERIA_OF_TRAINING
    # allocations do not depend on the criterion: all of them with one; with N:M all layers have one sparsity
    for allocation in (
        ALLOCATIONS_OF_TRAINING
        if scope != "global" and criterion == "magnitude" and pattern not in TARGET
        else ["uniform"]
    )
    if scope == "layer" or pattern not in CHANNELS
]


def kept_units(pruner, pattern):
    return {name: units(pattern, name, pruner.masks[name]) for name in NAMES}


def score_of(pruner, name):
    """What the criterion ranks by, from the weights and gradients of `Mixed`; None where a hash decides."""
    criterion = pruner.groups[0].criterion
    weight = pruner.parameters[name].detach()
    if criterion.requires == Requires.NOTHING:
        return weight.abs()
    if not criterion.requires & Requires.GRADIENTS:
        return None
    return criterion.score(weight, pruner.groups[0].scored_statistics(pruner.shards, pruner.masks)[name])


def competitors(scope, pattern, arrays):
    """Arrays of units that compete with each other: (layers, each of matrices) -> list of flat arrays."""
    if scope == "row":
        return [row for layer in arrays for matrix in layer for row in matrix]
    flat = [np.concatenate([matrix.reshape(-1) for matrix in layer]) for layer in arrays]
    return [np.concatenate(flat)] if scope == "global" else flat


@pytest.mark.parametrize("pattern, scope, allocation, criterion", COMBINATIONS)
def test_every_prune_step_is_exact(pattern, scope, allocation, criterion):
    model, target = Mixed(), TARGET.get(pattern, 0.8)
    config = PruningConfig(
        target_sparsity=target,
        pattern=pattern,
        scope=scope,
        allocation=allocation,
        criterion=criterion,
        max_sparsity_per_layer=1.0,
    )
    pruner = Pruner(model, config)
    scattered = pattern == "unstructured" and scope != "row"
    before = kept_units(pruner, pattern)
    count = sum(matrix.size for layer in before.values() for matrix in layer)
    for step in range(1, STEPS + 1):
        model.fake_gradients(step)
        if pruner.observes:
            assert pruner.observe()
        ranked = {name: score_of(pruner, name) for name in NAMES}
        masks = {name: pruner.masks[name] for name in NAMES}
        pruner.update(step, STEPS)
        after = kept_units(pruner, pattern)

        pruned = sum(int((matrix == 0).sum()) for layer in after.values() for matrix in layer)
        assert pruned == round(target * (1 - (1 - step / STEPS) ** 3) * count)  # cubic
        assert all(np.isin(matrix, (0, 1)).all() for layer in after.values() for matrix in layer), "half a unit"
        for name, weight in pruner.parameters.items():
            assert not (pruner.masks[name] & ~masks[name]).any(), "a weight was restored"
            zeros = weight.detach()[~pruner.masks[name]]
            assert not zeros.view(torch.int32).any(), "not +0.0"
            assert torch.count_nonzero(weight) == torch.count_nonzero(pruner.masks[name])
        if scope == "row":
            for name in NAMES:
                rows = np.concatenate([(matrix == 0).sum(1) for matrix in after[name]])
                assert rows.max() - rows.min() <= 1
        if criterion == "random":
            continue
        if scattered:  # ties are pruned in the order of memory
            dead = {name: np.asarray(masks[name]).reshape(-1) == 0 for name in NAMES}
            flat = {name: np.asarray(ranked[name]).reshape(-1) for name in NAMES}
            arrays = [[np.where(dead[name], -np.inf, flat[name])[None]] for name in NAMES]
            masked = [[np.asarray(pruner.masks[name].float()).reshape(1, -1)] for name in NAMES]
        else:
            arrays = [scores(pattern, name, ranked[name], masks[name]) for name in NAMES]
            masked = [after[name] for name in NAMES]
        for group, kept in zip(competitors(scope, pattern, arrays), competitors(scope, pattern, masked)):
            np.testing.assert_array_equal(kept == 0, lowest(group, int((kept == 0).sum())))


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("pattern, keep", [("2:4", 2), ("1:4", 1)])
def test_n_of_m_runs_along_the_inputs(pattern, keep, scope):
    """Conv1D holds (inputs, outputs), Conv2d (outputs, inputs, ...), experts (..., outputs, inputs) or transposed."""
    pruner = Pruner(Mixed(), PruningConfig(pattern=pattern, scope=scope, criterion="magnitude"))
    for step in (1, 2, 3):
        pruner.update(step, 3)
    masks = pruner.masks
    assert (masks["linear.weight"].view(16, 2, 4).sum(2) == keep).all()
    assert (masks["conv1d.weight"].view(2, 4, 12).sum(1) == keep).all()
    assert (masks["conv2d.weight"].view(4, 2, 4, 3, 1).sum(2) == keep).all()
    assert (masks["experts.up"].view(2, 4, 2, 4).sum(3) == keep).all()
    assert (masks["transposed.up"].view(2, 2, 4, 4).sum(2) == keep).all()


def test_channels_are_whole_outputs_or_inputs():
    outputs = ("channel", ((1,), (0,), (1, 2, 3), (2,), (1,)))
    inputs = ("channel:in", ((0,), (1,), (0, 2, 3), (1,), (2,)))
    for pattern, dims in (outputs, inputs):
        pruner = Pruner(Mixed(), PruningConfig(target_sparsity=0.5, pattern=pattern, criterion="magnitude"))
        pruner.update(1, 1)
        for name, dim in zip(NAMES, dims):
            share = pruner.masks[name].float().mean(dim)
            assert ((share == 0) | (share == 1)).all() and 0 < share.mean() < 1


@pytest.mark.parametrize(
    "scope, allocation", [("global", "uniform"), *itertools.product(("row", "layer"), ALLOCATIONS_OF_TRAINING)]
)
def test_floors_and_caps_hold_and_the_total_is_exact(scope, allocation):
    model = Mixed()
    with torch.no_grad():
        model.linear.weight.mul_(1e-3)  # would lose everything
        model.experts.up.mul_(1e3)  # would lose nothing
    config = PruningConfig(
        target_sparsity=0.6, scope=scope, allocation=allocation, criterion="magnitude",
        min_sparsity_per_layer=0.5, max_sparsity_per_layer=0.75,
    )  # fmt: skip
    pruner = Pruner(model, config)
    for step in range(1, STEPS + 1):
        report = pruner.update(step, STEPS)
        assert report.zeros == round(pruner.scheduled(step, STEPS) * 448)
        assert all(layer.sparsity <= 0.75 for layer in report.layers)
    assert all(0.5 <= layer.sparsity <= 0.75 for layer in report.layers)
    if scope == "global":
        assert {layer.name: layer.zeros for layer in report.layers} | {"linear.weight": 96, "experts.up": 32} == {
            layer.name: layer.zeros for layer in report.layers
        }


def test_global_scope_refuses_units_of_different_sizes():
    with pytest.raises(ValueError, match=r'`scope` "global" ranks units of one size, but with `pattern` "channel"'):
        Pruner(Mixed(), PruningConfig(target_sparsity=0.5, pattern="channel", scope="global"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("criterion", ["magnitude", "snip_momentum"])
def test_the_masks_do_not_depend_on_the_dtype(dtype, criterion):
    """Eighths, and their products, are exact in every dtype."""
    config = PruningConfig(target_sparsity=0.8, criterion=criterion)
    pruners = [Pruner(Mixed(), config), Pruner(Mixed().to(dtype), config)]
    for pruner in pruners:
        pruner.model.fake_gradients(1)
        assert pruner.observe()
        pruner.update(1, 1)
    assert pruners[0].masks.digest() == pruners[1].masks.digest()
    assert {parameter.dtype for parameter in pruners[1].parameters.values()} == {dtype}


def test_weights_that_are_not_contiguous():
    plain, other = Mixed(), Mixed()
    for name in ("linear", "conv1d"):
        weight = getattr(other, name).weight
        weight.data = weight.data.t().contiguous().t()
    other.conv2d.to(memory_format=torch.channels_last)
    for scope in ("row", "layer", "global"):
        for criterion in ("magnitude", "snip"):
            pruners = [
                Pruner(model, PruningConfig(target_sparsity=0.5, scope=scope, criterion=criterion))
                for model in (plain, other)
            ]
            for pruner in pruners:
                pruner.model.fake_gradients(2)
                pruner.observe()
                pruner.update(1, 1)
            assert pruners[0].masks.digest() == pruners[1].masks.digest()
            assert all(torch.equal(pruners[0].parameters[name], pruners[1].parameters[name]) for name in NAMES)
