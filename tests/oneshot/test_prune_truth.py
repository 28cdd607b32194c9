"""Block by block pruning against a naive reference that runs the whole model before each block, in float64."""

import copy
from functools import partial

import naive
import pytest
import torch
from helpers.architectures import ARCHITECTURES

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.selection import swaps


NAMES = list(ARCHITECTURES)


def both(name, method, by=None, **options):
    """Two copies of a model, pruned by the library and by the reference, and the names of what was pruned."""
    architecture = ARCHITECTURES[name]
    found, batches = architecture.model(), architecture.batches()
    expected = copy.deepcopy(found)
    config = OneshotConfig(exclude=architecture.exclude and list(architecture.exclude), **options)
    names = [layer.name for layer in prune_oneshot(found, batches, config, progress=False).layers]
    parts = by(expected, names, batches[0]) if by else naive.by_blocks(architecture, names)
    assert sorted(name for part in parts for name in part) == sorted(names)
    naive.prune(expected, architecture, parts, batches, method)
    return dict(found.named_parameters()), dict(expected.named_parameters()), names


@pytest.mark.parametrize("name", NAMES)
def test_wanda_equals_the_reference(name):
    found, expected, names = both(name, naive.wanda, target_sparsity=0.5)
    assert len(names) >= 6
    for weight in found:
        assert torch.equal(found[weight], expected[weight]), weight


@pytest.mark.parametrize("name", NAMES)
def test_sparsegpt_equals_the_reference(name):
    options = {"pattern": "2:4", "solver": "sparsegpt", "on_unreached": "magnitude"}
    method = partial(naive.sparsegpt, text="2:4")
    found, expected, names = both(name, method, **options)
    for weight in found:
        assert torch.allclose(found[weight], expected[weight], rtol=1e-3, atol=1e-4), weight
    assert all(torch.equal(found[name] == 0, expected[name] == 0) for name in names)


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3_moe"])
def test_swaps_equal_the_reference(name, monkeypatch):
    """With all weights as candidates in every round."""
    monkeypatch.setattr(swaps, "_CANDIDATES", 1000)
    found, expected, names = both(name, partial(naive.wanda_and_swaps, swaps=3), target_sparsity=0.5, swaps=3)
    assert all(torch.equal(found[weight], expected[weight]) for weight in found)


@pytest.mark.parametrize("method, options", [(naive.wanda, {}), (naive.sparsegpt, {"solver": "sparsegpt"})])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart"])
def test_with_one_forward_each_weight_sees_the_pruned_ones_before_it(name, method, options):
    found, expected, names = both(name, method, naive.in_order, target_sparsity=0.5, forwards=1, **options)
    for weight in found:
        assert torch.allclose(found[weight], expected[weight], rtol=1e-3, atol=1e-4), weight
    assert all(torch.equal(found[name] == 0, expected[name] == 0) for name in names)


def test_not_sequential_all_weights_see_the_dense_model():
    def at_once(model, names, batch):
        return [names]

    found, expected, _ = both("llama", naive.wanda, at_once, target_sparsity=0.5, sequential=False)
    assert all(torch.equal(found[weight], expected[weight]) for weight in found)


@pytest.mark.parametrize("place", ["disk", "device"])
def test_the_storage_of_activations_has_no_effect(place):
    found, expected, _ = both("t5", naive.wanda, target_sparsity=0.5, activations=place)
    assert all(torch.equal(found[weight], expected[weight]) for weight in found)
