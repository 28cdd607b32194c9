"""Masks by given scores, in which pruned weights may return."""

import pytest
import torch
from torch import nn

from hf_sparse import Pruner, PruningConfig


def two_layers():
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False))
    for module in model:
        nn.init.constant_(module.weight, 1.0)
    return model


def scores_of(model, seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn(weight.shape) for name, weight in model.named_parameters()}


CASES = [
    ("global", "unstructured"),
    ("layer", "unstructured"),
    ("row", "unstructured"),
    ("row", "2:4"),
    ("layer", "2x2"),
]


@pytest.mark.parametrize("scope, pattern", CASES)
def test_selection_does_not_depend_on_earlier_masks(scope, pattern):
    """Two selections in turn leave the masks of the second alone, with exactly half pruned, and +0.0 there."""
    target = {} if pattern == "2:4" else {"target_sparsity": 0.5}
    config = PruningConfig(pattern=pattern, scope=scope, criterion="magnitude", **target)
    model, fresh = two_layers(), two_layers()
    pruner, reference = Pruner(model, config), Pruner(fresh, config)
    for seed in (0, 1):
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(1.0)
        pruner.select(1, 1, scores_of(model, seed))
    reference.select(1, 1, scores_of(fresh, 1))
    for name, weight in model.named_parameters():
        assert torch.equal(pruner.masks[name], reference.masks[name])
        assert torch.equal(weight != 0, pruner.masks[name])
    assert pruner.masked_sparsity() == 0.5


def test_by_hand_over_all_layers():
    """Half of 64 weights: the lowest scores of both layers together, whatever was pruned before."""
    model = two_layers()
    config = PruningConfig(target_sparsity=0.5, criterion="magnitude", max_sparsity_per_layer=1.0)
    pruner = Pruner(model, config)
    pruner.update(1, 1)
    scores = {"0.weight": torch.arange(32.0).view(4, 8), "1.weight": 100 + torch.arange(32.0).view(8, 4)}
    pruner.select(1, 1, scores)
    assert not pruner.masks["0.weight"].any() and pruner.masks["1.weight"].all()


def test_nan_scores_are_named():
    model = two_layers()
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="magnitude"))
    scores = scores_of(model)
    scores["1.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match='algorithm "gradual": scores are nan in "1.weight"'):
        pruner.select(1, 1, scores)
