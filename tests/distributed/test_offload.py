"""Weights that accelerate keeps elsewhere: brought for a while and put back changed. On the CPU; what execution on
another device would need is the same."""

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
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_are_pruned_as_others_and_saved(way, options, tmp_path):
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
    if not hasattr(model, "hf_device_map"):  # transformers then saves nothing of what is offloaded
        return
    model.save_pretrained(tmp_path / "pruned")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "pruned")
    assert all(bits_equal(tensor, plain.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_stay_where_they_are(way, tmp_path):
    """Those that were not in memory are not afterwards, in whatever dtype."""
    model = offloaded(way, tmp_path, dtype=torch.bfloat16)
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    assert away and {name for name, parameter in model.named_parameters() if parameter.is_meta} == away
    found = dict(iter_parameters(model))
    assert all(found[name].dtype == torch.bfloat16 for name in away)
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == away


def test_the_checkpoint_that_weights_are_read_from_is_not_written_to(tmp_path):
    """from_pretrained reads offloaded weights straight from the checkpoint's file."""
    model = offloaded("from_pretrained", tmp_path)
    before = load_file(tmp_path / "saved" / "model.safetensors")
    prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(bits_equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("way", WAYS[:3])  # accelerate itself finds no tied weight in a checkpoint's file
def test_tied_weights_that_are_offloaded(way, tmp_path):
    plain, model = llama(tie_word_embeddings=True), offloaded(way, tmp_path, tie_word_embeddings=True)
    for each in (plain, model):
        prune_oneshot(each, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    found = dict(iter_parameters(model))
    assert found.keys() - {"lm_head.weight"} == dict(plain.named_parameters()).keys()
    assert all(bits_equal(found[name], parameter) for name, parameter in plain.named_parameters())


@pytest.mark.parametrize("way", WAYS)
def test_an_exception_on_board_puts_everything_back(way, tmp_path):
    model = offloaded(way, tmp_path)
    block = model.model.layers[1]
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    with pytest.raises(KeyboardInterrupt):
        with onload(block), torch.no_grad():
            assert not any(parameter.is_meta for parameter in block.parameters())
            block.mlp.up_proj.weight[0] = 7.0
            raise KeyboardInterrupt
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == away
    found, plain = dict(iter_parameters(model)), llama()
    plain.model.layers[1].mlp.up_proj.weight.data[0] = 7.0
    assert all(bits_equal(found[name], parameter) for name, parameter in plain.named_parameters())
    batch = data()[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_a_forward_while_on_board_uses_and_keeps_what_is_there(tmp_path):
    model, batch = offloaded("disk_offload", tmp_path), data()[0]
    with torch.no_grad(), onload(model.model.layers[1]):
        model.model.layers[1].mlp.down_proj.weight.zero_()
        first = model(**batch).logits
        assert not model.model.layers[1].mlp.down_proj.weight.any()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, first)


def test_nothing_is_done_to_weights_that_are_at_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = weights(model)
    with onload(model):
        assert [name for name, _ in iter_parameters(model)] == [name for name, _ in model.named_parameters()]
    assert all(bits_equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert input_device(model) == torch.device("cpu") == input_device(nn.Identity())


def test_parameters_that_are_tied_come_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert [name for name, _ in iter_parameters(model)] == ["a.weight"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"criterion": "snip", "scope": "layer"}, 'criterion "snip" needs gradients, but some weights are offloaded'),
        ({"scope": "global"}, 'scope "global" needs all weights at once, but some are offloaded: use scope=layer'),
        ({"sequential": False}, "sequential=False needs all weights at once, but some are offloaded: leave it out"),
    ],
)
def test_what_needs_all_weights_at_once_is_refused(options, words, tmp_path):
    model = offloaded("cpu_offload", tmp_path)
    with pytest.raises(PruningConfigError, match=words):
        prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5, **options), progress=False)
