"""Dynamic sparse training on a pruner: exchanges drawn by hand, and RigL and SET by their definition."""

import math

import pytest
import torch
from helpers.mixed import NAMES, Mixed
from torch import nn

from hf_sparse import Pruner, PruningConfig
from hf_sparse.algorithms.acdc import ACDC
from hf_sparse.algorithms.granet import GraNet
from hf_sparse.algorithms.growth import RandomGrowth
from hf_sparse.algorithms.rigl import RigL


def linear(rows):
    weight = torch.tensor(rows)
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def drawn(pruner):
    return ["".join("#" if kept else "." for kept in row) for row in pruner.masks["0.weight"]]


def start(model, **options):
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, **options))
    pruner.start_sparse()
    return pruner


def constant(fraction):
    return {"fraction": fraction, "decay": "constant"}


# Exchanges by hand


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_an_exchange_by_hand(scope):
    """5 of 5, 6, 7, 8 is exchanged for 2, which has the largest gradient of those that are pruned."""
    model = linear([[1.0, 2, 3, 4, 5, 6, 7, 8]])
    pruner = start(model, algorithm="rigl", algorithm_kwargs=constant(0.25), scope=scope)
    assert drawn(pruner) == ["....####"] and model[0].weight.tolist() == [[0, 0, 0, 0, 5, 6, 7, 8]]
    with torch.no_grad():
        model[0].weight.add_(0.5)  # as an optimizer that moves pruned weights too
    model[0].weight.grad = torch.tensor([[1.0, -5, 2, 0, 3, 9, 9, 9]])
    pruner.update(1, 2)
    assert drawn(pruner) == [".#...###"] and model[0].weight.tolist() == [[0, 0, 0, 0, 0, 6.5, 7.5, 8.5]]


def test_a_weight_can_return_in_the_step_that_has_pruned_it():
    """It keeps its value then."""
    model = linear([[1.0, 2, 3, 4]])
    pruner = start(model, algorithm="rigl", algorithm_kwargs=constant(0.5))
    model[0].weight.grad = torch.tensor([[1.0, 2, 3, 0]])
    pruner.update(1, 2)
    assert drawn(pruner) == ["..##"] and model[0].weight.tolist() == [[0, 0, 3, 4]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_groups_of_n_of_m_gain_as_many_as_they_lose(scope):
    """The two lowest of 3 4 7 8 5 6 are 3 and 4, of one group: both of its places are given by its own gradients."""
    model = linear([[1.0, 2, 3, 4, 0.5, 0.6, 7, 8], [1, 5, 6, 2, 0.1, 9, 0.2, 9]])
    pruner = start(model, pattern="2:4", algorithm="rigl", algorithm_kwargs=constant(0.25), scope=scope)
    assert drawn(pruner) == ["..##..##", ".##..#.#"]
    model[0].weight.grad = torch.tensor([[5.0, 0, 4, 1, 9, 9, 9, 9], [9.0] * 8])
    pruner.update(1, 2)
    assert drawn(pruner) == ["#.#...##", ".##..#.#"] and model[0].weight[0].tolist() == [0, 0, 3, 0, 0, 0, 7, 8]


def test_blocks_are_exchanged_by_their_mean_gradient():
    model = linear([[1.0, 2, 3, 4], [1, 2, 3, 4]])
    pruner = start(model, pattern="2x1", algorithm="rigl", algorithm_kwargs=constant(0.5))
    model[0].weight.grad = torch.tensor([[0.0, 2, 1, 1], [3, 2, 1, 1]])
    pruner.update(1, 2)
    assert drawn(pruner) == [".#.#"] * 2


def test_a_bound_of_layers_holds_after_an_exchange_over_all_layers():
    """All gradients are in the first layer, which would otherwise gain all."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    options = {"scope": "global", "max_sparsity_per_layer": 0.75, "min_sparsity_per_layer": 0.25}
    pruner = start(model, algorithm="rigl", algorithm_kwargs=constant(1.0), **options)
    model[0].weight.grad, model[1].weight.grad = torch.rand(4, 4) + 1, torch.zeros(4, 4)
    pruner.update(1, 2)
    assert [pruner.masks.pruned(name) for name in pruner.masks] == [4, 12]


def test_dense_phases_open_masks_and_compressed_ones_keep_theirs():
    model = linear([[1.0, 2, 3, 4]])
    pruner = start(model, algorithm=ACDC(compressed_phases=2))
    masks = []
    for step in range(1, 7):
        with torch.no_grad():
            model[0].weight.add_(torch.tensor([[9.0, 0, 0, 0]]) if step == 4 else 0.0)
        pruner.update(step, 6)
        masks += drawn(pruner)
    assert masks == ["..##", "..##", "####", "####", "#..#", "#..#"]
    assert model[0].weight.tolist() == [[9, 0, 0, 4]]


@pytest.mark.parametrize("total", range(1, 25))
def test_the_last_phase_is_compressed_whatever_the_number_of_prune_steps(total):
    sparsities = [ACDC(compressed_phases=3).sparsity(0.0, 0.5, step, total) for step in range(1, total + 1)]
    assert sparsities[-1] == 0.5
    changes = sum(left != right for left, right in zip(sparsities, sparsities[1:]))
    assert changes == min(5, total) - 1
    assert total < 5 or sparsities[0] == 0.5


# By definition


@pytest.mark.parametrize("name", ["rigl", "set", "granet"])
def test_exchanges_by_definition(name):
    """Layer by layer, from the algorithm's description: prune the lowest magnitudes, grow the highest scores."""
    model, steps, fraction = Mixed(), 6, 0.4
    options = {"scope": "layer", "sparsity_decay_type": "linear"} if name == "granet" else {"scope": "layer"}
    pruner = start(model, algorithm=name, algorithm_kwargs={"fraction": fraction}, **options)
    kept = {layer: pruner.masks[layer].flatten() for layer in NAMES}
    for step in range(1, steps + 1):
        model.fake_gradients(step)
        generator = torch.Generator().manual_seed(step)
        for layer in NAMES:  # distinct numbers, so that there are no ties
            weight = pruner.parameters[layer]
            for tensor in (weight.data, weight.grad):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            weight.data.mul_(kept[layer].view(weight.shape))
        expected = {}
        for layer in NAMES:
            weight, gradient = (
                tensor.flatten() for tensor in (pruner.parameters[layer].data, pruner.parameters[layer].grad)
            )
            mask, size = kept[layer].clone(), weight.numel()
            num_kept = size - round(size * 0.5 * (step / steps if name == "granet" else 1))
            order = weight.abs().masked_fill(~mask, -1).argsort(descending=True, stable=True)
            exchanged = round(fraction * (1 + math.cos(math.pi * step / steps)) / 2 * num_kept)
            mask = torch.zeros(size, dtype=torch.bool)
            mask[order[: num_kept - exchanged]] = True
            expected[layer] = mask, exchanged, gradient.abs()
        pruner.update(step, steps)
        for layer, (survivors, exchanged, gradient) in expected.items():
            mask = pruner.masks[layer].flatten()
            assert (mask & survivors).equal(survivors) and int((mask & ~survivors).sum()) == exchanged
            if name != "set":
                grown = gradient.masked_fill(survivors, -1).argsort(descending=True, stable=True)[:exchanged]
                assert mask[grown].all()
            kept[layer] = mask
            weight = pruner.parameters[layer].detach().flatten()
            assert not weight[~mask].any() and not torch.signbit(weight[~mask]).any()


def test_random_growth_is_uniform_over_positions_and_new_at_each_prune_step():
    positions = torch.arange(10_000)
    scores = [RandomGrowth(step).score(torch.zeros(10_000), positions) for step in (1, 2, 10**6)]
    for score in scores:
        assert abs(float(score.mean()) - 0.5) < 0.01 and 0 <= score.min() and score.max() < 1
    pairs = torch.corrcoef(torch.stack(scores))
    assert (pairs - torch.eye(3)).abs().max() < 0.03


def test_initial_masks_are_random_or_those_of_the_criterion():
    model, dense = Mixed(), Mixed()
    options = {"algorithm": "set", "allocation": "erdos_renyi"}
    pruner = start(model, algorithm_kwargs={"initial_mask": "random"}, **options)
    assert pruner.masked_sparsity() == pruner.sparsity() == 0.5
    zeros = {name: pruner.masks.pruned(name) / pruner.masks[name].numel() for name in NAMES}
    assert zeros["linear.weight"] > zeros["experts.up"]
    magnitude = start(dense, **options)
    assert {name: magnitude.masks.pruned(name) for name in NAMES} == {
        name: pruner.masks.pruned(name) for name in NAMES
    }
    assert magnitude.masks.digest() != pruner.masks.digest()


def test_options_and_defaults():
    (group,) = PruningConfig(target_sparsity=0.5, algorithm=RigL(0.1)).resolve_groups().values()
    assert (group.criterion_name, group.scope, group.to_dict()["scheduler"]) == ("magnitude", "layer", None)
    (group,) = PruningConfig(target_sparsity=0.5, algorithm="granet", criterion="snip").resolve_groups().values()
    assert (group.criterion_name, group.scope, group.to_dict()["scheduler"]) == ("snip", "global", "iterative")
    assert [round(GraNet(0.4, decay).exchanged_fraction(1, 4), 3) for decay in ("cosine", "linear", "constant")] == [
        0.341,
        0.3,
        0.4,
    ]
