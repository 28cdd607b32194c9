"""Errors of one-shot pruning: the cause, the layer or batch, and the remedy."""

import logging
from functools import partial

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.tiny import same, weights
from torch import nn

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.config import PruningConfigError


class Skip(nn.Module):
    """Blocks of which one, or the head, reads more than the output of the block before it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        third = self.blocks[2](second + first if self.kind == "block" else second)
        third = self.blocks[1](third) if self.kind == "twice" else third
        return self.head(second if self.kind == "head" else third)


class Idle(nn.Module):
    """A layer that no forward calls, as Mamba's dt_proj, whose weight is multiplied with by hand."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block["a"](x) @ block["b"].weight
        return x


class Repeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x))


def data(rows=9):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 6, generator=generator) for _ in range(2)]


def refused(model, batches, words, kind=ValueError, **options):
    """Assert that a run raises an error and prunes nothing."""
    before = weights(model)
    if "pattern" not in options:
        options = {"target_sparsity": 0.5} | options
    with pytest.raises(kind, match=words):
        prune_oneshot(model, batches, OneshotConfig(**options), progress=False)
    assert same(weights(model), before)


AT_ONCE_OPTIONS = {"target_sparsity": 0.5, "targets": ["all-body"], "sequential": False}
AT_ONCE = "Prune all layers at once, .* with `sequential=False`"


@pytest.mark.parametrize(
    "kind, words",
    [
        ("block", f'block "blocks.2" reads more than the output of the block before it. {AT_ONCE}'),
        ("head", f'"head" reads outputs of blocks before the last one. {AT_ONCE}'),
        ("twice", f'block "blocks.1" runs 2 times in one forward. {AT_ONCE}'),
    ],
)
def test_models_whose_blocks_are_not_a_chain(kind, words):
    torch.manual_seed(0)
    model = Skip(kind)
    refused(model, data(), words, targets=["all-body"])
    dense, seen, handles = weights(model), {}, []
    for name in ("blocks.0.0", "blocks.1.0", "blocks.2.0", "head"):
        hook = partial(lambda inputs, module, args: inputs.append(args[0]), seen.setdefault(name, []))
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    for batch in data():
        model(batch)
    for handle in handles:
        handle.remove()
    seen = {name: torch.cat(parts) for name, parts in seen.items()}
    report = prune_oneshot(model, data(), OneshotConfig(**AT_ONCE_OPTIONS), progress=False)
    assert len(report.layers) == 4
    for layer in report.layers:
        scores = dense[layer.name].abs() * seen[layer.name.removesuffix(".weight")].norm(dim=0)
        kept = scores > scores.kthvalue(3, dim=1, keepdim=True)[0]
        assert torch.equal(model.get_parameter(layer.name), dense[layer.name] * kept)


def test_a_model_without_blocks():
    refused(nn.ModuleDict({"a": nn.Linear(6, 6)}).a, data(), "Linear has no repeated blocks .*ModuleList.*sequential")
    model = nn.Linear(6, 6)
    prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5, sequential=False), progress=False)
    assert int((model.weight == 0).sum()) == 18


def test_albert_calls_its_block_several_times():
    from transformers import AlbertConfig, AlbertModel

    sizes = {"vocab_size": 48, "hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2}
    model = AlbertModel(AlbertConfig(**sizes, num_hidden_layers=2, intermediate_size=24))
    refused(model, ARCHITECTURES["gpt2"].batches(), r'block "encoder\..*" runs 2 times in one forward')


def test_a_layer_that_is_never_reached():
    words = r'2 of 4 selected weights are never reached .* such as blocks.0.b, blocks.1.b.*exclude=\["blocks.0.b"\]'
    refused(Idle(), data(), words)
    words = f'"blocks.0" is in a module list .* the model calls its submodules and not itself, .* {AT_ONCE}'
    refused(Idle(), data(), words, exclude=["*.b"])
    config = OneshotConfig(target_sparsity=0.5, exclude=["*.b"], sequential=False)
    assert prune_oneshot(Idle(), data(), config, progress=False).zeros == 36


def test_a_weight_that_is_called_twice():
    """The inputs of both calls count; with forwards=1 it is an error."""
    torch.manual_seed(0)
    model = nn.Sequential(Repeats())
    words = '"0.layer" is called several times in one forward: use `forwards=2`'
    refused(model, data(), words, forwards=1)
    layer = model[0].layer
    x = torch.cat(data())
    scores = layer.weight.abs() * torch.cat([x, layer(x)]).norm(dim=0)
    kept = (scores > scores.kthvalue(3, dim=1, keepdim=True)[0]).detach()
    prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    assert torch.equal(layer.weight != 0, kept)


# Experts


def few_tokens():
    return [{"input_ids": torch.tensor([[5]])}]


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"allocation": "owl"}, {"solver": "sparsegpt"}], ids=str)
def test_an_expert_that_no_token_reaches(options, caplog):
    """Two of four experts get the only token; the others have two weights each."""
    model = ARCHITECTURES["qwen3_moe"].model()
    words = r'no token of the calibration data reaches \d+ of \d+ inputs, such as that of "model.layers.0.mlp.experts'
    refused(model, few_tokens(), words, **options)
    before = weights(model)
    options = {"target_sparsity": 0.5, "on_unreached": "magnitude"} | options
    report = prune_oneshot(model, few_tokens(), OneshotConfig(**options), progress=False)
    idle = {
        record.getMessage().split('"')[1] for record in caplog.records if "no token reaches" in record.getMessage()
    }
    assert len(idle) == 8 and report.zeros == round(0.5 * report.selected)
    if options.keys() == {"target_sparsity", "on_unreached"}:  # the smallest weights of each row are pruned
        for name, expert in (text.removesuffix("]").split("[") for text in idle):
            old, new = before[name][int(expert)], model.get_parameter(name)[int(expert)]
            kept = old.abs() > old.abs().kthvalue(old.shape[1] // 2, dim=1, keepdim=True)[0]
            assert torch.equal(new, old * kept)


def test_an_expert_without_tokens_competes_with_the_others():
    """With scope global its inputs count as large as those of other experts, so that it is not pruned entirely."""
    model = ARCHITECTURES["qwen3_moe"].model()
    options = {"target_sparsity": 0.5, "on_unreached": "magnitude", "scope": "global"}
    prune_oneshot(model, few_tokens(), OneshotConfig(**options), progress=False)
    shares = (model.model.layers[0].mlp.experts.gate_up_proj == 0).float().mean(dim=(1, 2))
    assert shares.max() < 0.75


def test_options_that_experts_do_not_support():
    model = ARCHITECTURES["qwen3_moe"].model()
    refused(model, ARCHITECTURES["gpt2"].batches(), "`forwards=1` does not go with fused experts", forwards=1)
    words = (
        'padding cannot be distinguished from tokens .* "model.layers.0.mlp.experts", but calibration batch 0 has some'
    )
    refused(model, ARCHITECTURES["llama"].batches(), words)
    whole = [batch | {"attention_mask": torch.ones_like(batch["input_ids"])} for batch in few_tokens()]
    prune_oneshot(model, whole, OneshotConfig(target_sparsity=0.5, on_unreached="magnitude"), progress=False)


# Data


@pytest.mark.parametrize("options", [{}, {"solver": "sparsegpt"}, {"allocation": "owl"}], ids=str)
def test_inputs_that_are_not_finite_name_the_layer(options):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    batches = data()
    batches[1][2, 3] = torch.nan
    refused(model, batches, r'inputs of "0.weight": inputs must be finite, but 1 of 6 \(input 3 first\)', **options)
    model[0].weight.data[4] = torch.inf
    options |= {"targets": ["1"]}
    refused(model, data(), r'inputs of "1.weight": inputs must be finite, but 1 of 6 \(input 4 first\)', **options)


def test_too_little_data_for_a_gram_matrix(caplog):
    model = nn.Sequential(nn.Linear(6, 4))
    with caplog.at_level(logging.WARNING):
        prune_oneshot(
            model, data(2), OneshotConfig(pattern="1x2", target_sparsity=0.5, solver="sparsegpt"), progress=False
        )
    assert "calibration data of 4 tokens is too little for Gram matrices of full rank: 1 weights" in caplog.text
    assert '"0.weight" with 6' in caplog.text and "More data improves the result" in caplog.text
    words = "4 tokens is too little .* Give 6 tokens or more, .* or a damping"
    refused(
        nn.Sequential(nn.Linear(6, 4)),
        data(2),
        words,
        PruningConfigError,
        solver="sparsegpt",
        solver_kwargs={"dampening": 0},
    )
    caplog.clear()
    prune_oneshot(model, data(2), OneshotConfig(target_sparsity=0.5, swaps=2), progress=False)
    assert "too little" in caplog.text and "damping" not in caplog.text
    caplog.clear()
    prune_oneshot(model, data(3), OneshotConfig(target_sparsity=0.5, solver="sparsegpt"), progress=False)
    assert "too little" not in caplog.text


@pytest.mark.parametrize("batches", [None, []])
@pytest.mark.parametrize(
    "options, what",
    [
        ({}, '`criterion` "wanda"'),
        ({"solver": "sparsegpt"}, '`solver` "sparsegpt"'),
        ({"criterion": "snip"}, "snip"),
        ({"criterion": "magnitude", "swaps": 5}, "swaps=5"),
    ],
)
def test_no_calibration_data(options, what, batches):
    refused(nn.Sequential(nn.Linear(6, 6)), batches, f"{what}.* needs calibration data, but there is none", **options)


def test_one_forward_needs_batches_of_one_length():
    batches = ARCHITECTURES["gpt2"].batches(2)
    batches[1] = {"input_ids": batches[1]["input_ids"][:, :7]}
    model = ARCHITECTURES["gpt2"].model()
    refused(model, batches, "different lengths or kinds cannot be concatenated, which `forwards=1`", forwards=1)
    prune_oneshot(model, batches, OneshotConfig(target_sparsity=0.5), progress=False)


def test_no_loss():
    words = 'needs a loss, but the model gives none for calibration batch 0: add "labels" to the batches'
    refused(ARCHITECTURES["bert"].model(), ARCHITECTURES["bert"].batches(), words, criterion="snip")


def test_gradients_that_are_not_finite():
    model = ARCHITECTURES["gpt2"].model()
    model.transformer.ln_f.weight.data[0] = torch.inf
    refused(
        model, ARCHITECTURES["gpt2"].batches(), "gradients of calibration batch 0 are inf or nan", criterion="snip"
    )


# Models


def test_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, 4))
    images = [torch.randn(2, 3, 4, 4)]
    words = r'not observed, but "0" is one: .* `exclude=\["0"\]`, or use `criterion="magnitude"`'
    refused(model, images, words, PruningConfigError)
    prune_oneshot(model, images, OneshotConfig(target_sparsity=0.5, criterion="magnitude"), progress=False)
    assert int((model[0].weight == 0).sum()) + int((model[2].weight == 0).sum()) == (48 + 144) // 2


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(NotImplementedError, match="on the meta device, where it holds no values"):
        prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5), progress=False)


def test_sharded_weights(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 6))
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Shard(0)]))
        with pytest.raises(NotImplementedError, match='"0.weight" is sharded over processes, .* needs whole weights'):
            prune_oneshot(model, data(), OneshotConfig(target_sparsity=0.5), progress=False)
    finally:
        dist.destroy_process_group()


def test_all_errors_are_raised_together():
    model = nn.Sequential(nn.Conv2d(3, 4, 2))
    with pytest.raises(PruningConfigError) as raised:
        prune_oneshot(model, None, OneshotConfig(target_sparsity=0.5), progress=False)
    assert len(raised.value.errors) == 2
