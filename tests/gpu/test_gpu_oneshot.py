"""One-shot pruning on a GPU, with weights there and with weights that stay on the CPU."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from helpers.modes import llama
from helpers.tiny import bits_equal
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.distributed import iter_parameters


METHODS = {
    "magnitude": {"target_sparsity": 0.5, "criterion": "magnitude"},
    "snip": {"target_sparsity": 0.5, "criterion": "snip"},
    "wanda": {"target_sparsity": 0.5},
    "wanda global": {"target_sparsity": 0.5, "scope": "global"},
    "wanda owl": {"target_sparsity": 0.5, "allocation": "owl"},
    "wanda 2:4": {"pattern": "2:4"},
    "wanda in one forward": {"target_sparsity": 0.5, "forwards": 1},
    "sparsegpt": {"target_sparsity": 0.5, "solver": "sparsegpt"},
    "sparsegpt 2:4": {"pattern": "2:4", "solver": "sparsegpt"},
    "sparsegpt after wanda": {"target_sparsity": 0.5, "criterion": "wanda", "solver": "sparsegpt"},
}


def data(count=4, vocabulary=40, length=12):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, vocabulary, (4, length), generator=generator)} for _ in range(count)]


def model():
    return llama(num_hidden_layers=2).eval()


@pytest.mark.parametrize("method", METHODS)
def test_as_many_weights_are_pruned_as_on_the_cpu_and_almost_the_same(device, method):
    expected, found = model(), model().to(device)
    config = OneshotConfig(**METHODS[method])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse.numerics.NUMPY_DEVICES", ("cpu",))
        report = prune_oneshot(expected, data(), config, progress=False)
    other = prune_oneshot(found, data(), config, progress=False)
    assert other.sparsity == report.sparsity
    names = [layer.name for layer in report.layers]
    masks = {
        name: torch.stack([expected.get_parameter(name) == 0, found.get_parameter(name).cpu() == 0]) for name in names
    }
    differing = sum(int((one != other).sum()) for one, other in masks.values())
    total = sum(mask[0].numel() for mask in masks.values())
    # Sums of inputs are rounded in another order, which decides between scores that are almost equal.
    assert differing <= 0.01 * total, f"{differing} of {total}"
    with torch.no_grad():
        logits = [
            network(data()[0]["input_ids"].to(where)).logits.cpu()
            for network, where in ((expected, "cpu"), (found, device))
        ]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.05


@pytest.mark.parametrize("storage", ["cpu", "device", "disk"], ids=["host", "device", "disk"])
def test_where_the_outputs_of_blocks_are_kept_changes_nothing(device, reproducible, storage):
    found = []
    for activations in ("device", storage):
        network = model().to(device, torch.bfloat16)
        config = OneshotConfig(target_sparsity=0.5, solver="sparsegpt", activations=activations)
        prune_oneshot(network, data(), config, progress=False)
        found.append(network.state_dict())
    assert all(bits_equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt 2:4"])
def test_weights_that_stay_on_the_host_are_pruned_like_others(device, reproducible, method):
    plain, config = model(), OneshotConfig(**METHODS[method])
    offloaded = cpu_offload(copy.deepcopy(plain), execution_device=device)
    plain.to(device)
    expected = prune_oneshot(plain, data(), config, progress=False)
    assert prune_oneshot(offloaded, data(), config, progress=False) == expected
    found = dict(iter_parameters(offloaded))
    assert all(bits_equal(found[name].cpu(), tensor.cpu()) for name, tensor in plain.named_parameters())
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def test_the_whole_model_is_never_on_the_gpu(cuda):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    network = LlamaForCausalLM(config)
    size = sum(parameter.nbytes for parameter in network.parameters())
    block = sum(parameter.nbytes for parameter in network.model.layers[0].parameters())
    cpu_offload(network, execution_device=cuda)
    torch.ones(8, 8, device=cuda) @ torch.ones(8, 8, device=cuda)  # makes the workspace of the matrix products
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prune_oneshot(network, data(vocabulary=64), OneshotConfig(target_sparsity=0.5), progress=False)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < size / 2, f"{peak / block:.1f} blocks of {size / block:.0f}"
