"""Weights offloaded by accelerate are onloaded, pruned and stored again. The execution device is the CPU here."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers.tiny import bits_equal, weights
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.config import PruningConfigError
from hf_sparse.distributed import input_device, is_offloaded, iter_parameters, onload


SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 32, "num_key_value_heads": 1}


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options)).to(dtype).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 48, (3, 10), generator=generator)} for _ in range(4)]


DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
DISK |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
WAYS = ["cpu_offload", "disk_offload", "dispatch_model", "from_pretrained"]


def offloaded(way, folder, **options):
    model = llama(**options)
    if way == "cpu_offload":
        return cpu_offload(model, execution_device="cpu")
    if way == "disk_offload":
        return disk_offload(model, str(folder / "offload"), execution_device="cpu")
    if way == "dispatch_model":
        return dispatch_model(model, DISK, main_device="cpu", offload_dir=str(folder / "offload"))
    model.save_pretrained(folder / "saved")
    return LlamaForCausalLM.from_pretrained(
        folder / "saved", device_map=DISK, offload_folder=str(folder / "offload"), dtype=model.dtype
    )


@pytest.mark.parametrize(
    "options",
    [
        {"target_sparsity": 0.5},
        {"pattern": "2:4", "solver": "sparsegpt"},
        {"target_sparsity": 0.5, "criterion": "magnitude", "scope": "layer"},
        {"target_sparsity": 0.5, "forwards": 1, "solver": "sparsegpt"},
        {"target_sparsity": 0.5, "allocation": "owl", "keep_zeros": True},
        {"target_sparsity": 0.5, "pattern": "neuron"},
        {"target_sparsity": 0.5, "reconstruct": True, "reconstruct_kwargs": {"steps": 5, "samples": 4}},
        {"target_sparsity": 0.5, "criterion": "magnitude", "scope": "layer", "reconstruct": True}
        | {"reconstruct_kwargs": {"steps": 5, "samples": 4, "window": 1, "inputs": "dense"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_are_pruned_like_others_and_saved(way, options, tmp_path):
    plain, model = llama(), offloaded(way, tmp_path)
    assert is_offloaded(model) and not is_offloaded(plain)
    expected = prune_oneshot(plain, data(), OneshotConfig(**options), progress=False)
    report = prune_oneshot(model, data(), OneshotConfig(**options), progress=False)
    assert report == expected
    found = dict(iter_parameters(model))
    assert all(bits_equal(found[name], parameter) for name, parameter in plain.named_parameters())
    batch = data()[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    if not hasattr(model, "hf_device_map"):  # transformers cannot save offloaded weights then
        return
    model.save_pretrained(tmp_path / "pruned")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "pruned")
    assert all(bits_equal(tensor, plain.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_stay_offloaded(way, tmp_path):
    model = offloaded(way, tmp_path, dtype=torch.bfloat16)
    offloaded_names = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    assert (
        offloaded_names
        and {name for name, parameter in model.named_parameters() if parameter.is_meta} == offloaded_names
    )
    found = dict(iter_parameters(model))
    assert all(found[name].dtype == torch.bfloat16 for name in offloaded_names)
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == offloaded_names


def test_checkpoint_of_offloaded_weights_is_not_modified(tmp_path):
    """from_pretrained reads offloaded weights straight from the checkpoint's file."""
    model = offloaded("from_pretrained", tmp_path)
    before = load_file(tmp_path / "saved" / "model.safetensors")
    prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(bits_equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("way", WAYS[:3])  # accelerate does not find tied weights in a checkpoint
def test_offloaded_tied_weights(way, tmp_path):
    plain, model = llama(tie_word_embeddings=True), offloaded(way, tmp_path, tie_word_embeddings=True)
    for network in (plain, model):
        prune_oneshot(network, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    found = dict(iter_parameters(model))
    assert found.keys() - {"lm_head.weight"} == dict(plain.named_parameters()).keys()
    assert all(bits_equal(found[name], parameter) for name, parameter in plain.named_parameters())


@pytest.mark.parametrize("way", WAYS)
def test_exception_while_onloaded_restores_the_offloading(way, tmp_path):
    model = offloaded(way, tmp_path)
    block = model.model.layers[1]
    offloaded_names = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    with pytest.raises(KeyboardInterrupt):
        with onload(block), torch.no_grad():
            assert not any(parameter.is_meta for parameter in block.parameters())
            block.mlp.up_proj.weight[0] = 7.0
            raise KeyboardInterrupt
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == offloaded_names
    found, plain = dict(iter_parameters(model)), llama()
    plain.model.layers[1].mlp.up_proj.weight.data[0] = 7.0
    assert all(bits_equal(found[name], parameter) for name, parameter in plain.named_parameters())
    batch = data()[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_forward_while_onloaded_uses_and_keeps_the_weights(tmp_path):
    model, batch = offloaded("disk_offload", tmp_path), data()[0]
    with torch.no_grad(), onload(model.model.layers[1]):
        model.model.layers[1].mlp.down_proj.weight.zero_()
        first = model(**batch).logits
        assert not model.model.layers[1].mlp.down_proj.weight.any()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, first)


def test_onload_does_nothing_without_offloading():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = weights(model)
    with onload(model):
        assert [name for name, _ in iter_parameters(model)] == [name for name, _ in model.named_parameters()]
    assert all(bits_equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert input_device(model) == torch.device("cpu") == input_device(nn.Identity())


def test_tied_parameters_are_yielded_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert [name for name, _ in iter_parameters(model)] == ["a.weight"]


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"criterion": "snip", "scope": "layer"},
            '`criterion` "snip" needs gradients, but some weights are offloaded',
        ),
        ({"scope": "global"}, '`scope` "global" needs all weights at once, .* use `scope="layer"`'),
        ({"sequential": False}, "`sequential=False` needs all weights at once, but some are offloaded: leave it out"),
    ],
)
def test_options_that_need_all_weights_at_once_raise(options, words, tmp_path):
    model = offloaded("cpu_offload", tmp_path)
    with pytest.raises(PruningConfigError, match=words):
        prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5, **options), progress=False)
