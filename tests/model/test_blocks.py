"""Repeated blocks are found by the structure of a model."""

import pytest
from helpers.architectures import ARCHITECTURES
from torch import nn

from hf_sparse.model.blocks import find_block_lists, group_by_block
from hf_sparse.model.layers import find_layers


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_block_lists_of_every_architecture(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    layers = [layer for layer in find_layers(model) if layer.in_body]
    blocks = [f"{block}." for names in find_block_lists(model, layers).values() for block in names]
    assert blocks == list(architecture.blocks)
    groups = group_by_block(model, layers)
    assert sorted(layer.name for group in groups for layer in group) == sorted(layer.name for layer in layers)
    for group in groups:
        prefixes = {next((block for block in blocks if layer.name.startswith(block)), None) for layer in group}
        assert len(prefixes) == 1


def test_lists_without_layers_are_not_block_lists():
    model = nn.ModuleDict(
        {
            "first": nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3)]),
            "second": nn.Sequential(nn.ReLU(), nn.Linear(3, 3)),
            "end": nn.Linear(3, 1),
        }
    )
    layers = find_layers(model)
    assert find_block_lists(model, layers) == {
        "first": ["first.0", "first.1"],
        "second": ["second.0", "second.1"],
    }
    assert list(find_block_lists(model, [layer for layer in layers if "second" in layer.name])) == ["second"]
    assert [[layer.name for layer in group] for group in group_by_block(model, layers)] == [
        ["first.0.0.weight"],
        ["first.1.weight"],
        ["second.1.weight"],
        ["end.weight"],
    ]
