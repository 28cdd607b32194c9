"""Masks of coupled units on a GPU are those of the CPU."""

import pytest
import torch
from helpers.model_types import MODEL_TYPES

from hf_sparse import Pruner, PruningConfig


def masks(name, device, options):
    """The masks after two prune steps. Eighths, whose sums are exact: what is compared is which units are pruned."""
    model = MODEL_TYPES[name].make()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (torch.randint(-16, 17, parameter.shape, generator=generator) / 8).to(device)
        parameter.grad = (torch.randint(-16, 17, parameter.shape, generator=generator) / 8).to(device)
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, **options))
    for prune_step in (1, 2):
        pruner.observe()
        pruner.update(prune_step, 2)
    for parameter_name, shard in pruner.shards.items():
        assert not shard.tensor[~pruner.masks[parameter_name]].any()
    return {name: pruner.masks[name].cpu() for name in pruner.masks}


@pytest.mark.parametrize("pattern", ["neuron", "head", "layer"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_gpu_prunes_the_units_that_the_cpu_prunes(name, pattern, device):
    for criterion in ("magnitude", "snip", "taylor", "random"):
        options = {"pattern": pattern, "criterion": criterion, "scope": "global"}
        expected, found = (masks(name, where, options) for where in ("cpu", device))
        assert not all(mask.all() for mask in expected.values())
        assert all(torch.equal(expected[key], found[key]) for key in expected)
