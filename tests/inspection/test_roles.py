"""The guess, by names and shapes, is what the pruner selects in the model itself."""

import json

import pytest
import torch
import transformers
from helpers.tiny import bert, gpt2
from safetensors.torch import save_file

from hf_sparse import Pruner, PruningConfig
from hf_sparse.inspection import inspect_checkpoint
from hf_sparse.inspection.checkpoint import open_checkpoint
from hf_sparse.inspection.roles import Selection, guess_kinds, select_tensors
from hf_sparse.model.layers import find_layers, select_layers


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = SMALL | {"intermediate_size": 24, "num_key_value_heads": 2}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "bert": bert,
    "gpt2": gpt2,
    "masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=24)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama_classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**LLAMA, pad_token_id=0)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**VISION, image_size=8, patch_size=4)
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_the_guess_is_what_the_pruner_selects(saved):
    """Name for name, or in sum where the files' names are not the model's."""
    model, folder = saved
    checkpoint, layers = open_checkpoint(folder), select_layers(find_layers(model), None, None)[0]
    guess, kinds = select_tensors(checkpoint), guess_kinds(checkpoint.tensors)
    assert guess.selected_by == "guess"
    assert sum(checkpoint.tensors[name].numel for name in guess.names) == sum(layer.numel for layer in layers)
    if not isinstance(model, (transformers.MixtralForCausalLM, transformers.ViTForImageClassification)):
        assert {layer.name: (layer.kind,) for layer in layers} == {name: kinds[name] for name in guess.names}


def test_the_report_agrees_with_the_files_whatever_their_names(saved):
    model, folder = saved
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="magnitude"))
    report = pruner.update(1, 1)
    model.save_pretrained(folder)
    report.save(folder / "pruning_report.json")
    contents = inspect_checkpoint(folder)
    assert (contents.selected_by, contents.differences) == ("report", ())
    assert (contents.selected_weights, contents.selected_zeros) == (report.selected, report.zeros)
    assert contents.sparsity == pytest.approx(0.5, abs=1e-3)
    # One zero more than reported is noticed, by whatever name.
    with torch.no_grad():
        weight = dict(model.named_parameters())[report.layers[0].name]
        weight.view(-1)[weight.view(-1).nonzero()[0]] = 0
    model.save_pretrained(folder)
    (difference,) = inspect_checkpoint(folder).differences
    zeros = {report.layers[0].zeros, report.zeros}
    assert any(f" {count + 1:,} zeros, in the report {count:,}." in difference for count in zeros)


def test_fused_experts_are_scanned_in_both_layouts(tmp_path):
    live = torch.rand(2, 64, 32, 4).argsort(-1) < 2
    weight_EOI = torch.randn(2, 64, 128) * live.flatten(2)
    save_file(
        {"mlp.experts.up": weight_EOI, "mlp.experts.down": weight_EOI.mT.contiguous()}, tmp_path / "a.safetensors"
    )
    down, up = inspect_checkpoint(tmp_path).tensors
    assert (up.selected, up.structure.kind, up.structure.n_of_m) == (True, "experts", ("2:4",))
    assert (down.selected, down.structure.kind, down.structure.n_of_m) == (True, "experts_transposed", ("2:4",))


def test_report_and_config_beside_the_weights_select(tmp_path):
    bert().save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    (tmp_path / "pruning_config.json").write_text(json.dumps({"targets": ["*.query"]}))
    assert select_tensors(open_checkpoint(tmp_path)) == Selection("config", frozenset({name}))
    options = {
        "exclude": ["*.key"],
        "groups": {"a": {"targets": ["*.query", "*.key"]}, "b": {"targets": ["classifier"]}},
    }
    (tmp_path / "pruning_config.json").write_text(json.dumps(options))
    assert select_tensors(open_checkpoint(tmp_path)) == Selection("config", frozenset({name, "classifier.weight"}))
    report = {"parameters": 1, "parameter_zeros": 0, "target_sparsity": 0.5}
    layer = {"name": "classifier.weight", "group": "a", "pattern": "2:4", "weights": 48, "zeros": 0, "shape": [2, 24]}
    (tmp_path / "pruning_report.json").write_text(json.dumps(report | {"layers": [layer]}))
    assert select_tensors(open_checkpoint(tmp_path)) == Selection("report", frozenset({"classifier.weight"}))


def test_tied_embeddings(tmp_path):
    gpt2().save_pretrained(tmp_path)
    assert inspect_checkpoint(tmp_path).tied == {"output embeddings": "transformer.wte.weight"}
    bert().save_pretrained(tmp_path)  # has no output embeddings to tie
    assert inspect_checkpoint(tmp_path).tied == {}
