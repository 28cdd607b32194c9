"""Adapters on a pruned base: selection, training, resuming, and merging that keeps the zeros.

The expected merged weights are computed here from lora_A and lora_B, not by the package.
"""

import re
import shutil
import sys

import pytest
import torch
from helpers.invariants import exactly_positive_zero
from helpers.sft import SFT
from helpers.tiny import SCHEDULE, STEPS, bert, gpt2, make, same, weights
from torch import nn
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM, TrainerCallback

from hf_sparse import Pruner, PruningConfig, PruningConfigError, SparsityCallback, merge_and_unload, merged_adapter
from hf_sparse.integrations.merge_report import MergedLayer, MergeReport
from hf_sparse.model.layers import find_layers, select_layers


peft = pytest.importorskip("peft")

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
PEFT_QUERY = f"base_model.model.{QUERY}".replace(".weight", ".base_layer.weight")
SAVING = {"save_strategy": "steps", "save_steps": 2}


def prune(model, share=0.5):
    """Zeros by chance in the body's weights."""
    generator = torch.Generator().manual_seed(5)
    for layer in select_layers(find_layers(model), None, None)[0]:
        weight = model.get_parameter(layer.name).data
        weight[torch.rand(weight.shape, generator=generator) < share] = 0.0
    return model


def attach(model, targets=("query", "dense"), seed=3, **options):
    """A LoRA adapter whose update is not zero."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=[*targets], **{"init_lora_weights": False} | options)
    return peft.get_peft_model(model, config)


# What is selected


def selected(model, targets=None):
    layers, errors = select_layers(find_layers(model), targets, None)
    assert not errors
    return [layer.name for layer in layers]


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear"),
    "lora_and_head": lambda: peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"),
    "dora": lambda: peft.LoraConfig(target_modules=["query"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(target_modules=["query"]),
    "vera": lambda: peft.VeraConfig(target_modules=["query", "key"]),
    "ia3": lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_weights_of_the_base_are_selected_and_none_of_an_adapter(adapter):
    expected = selected(bert())
    model = peft.get_peft_model(bert(), ADAPTERS[adapter]())
    found = selected(model)
    assert [name.removeprefix("base_model.").removeprefix("model.").replace(".base_layer", "") for name in found] == (
        expected
    )


def test_an_adapter_inside_a_model_of_transformers_is_not_selected_either():
    model = bert()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    assert [name.replace(".base_layer", "") for name in selected(model)] == selected(bert())


def test_targets_written_for_the_plain_model_hold_with_an_adapter():
    model = attach(bert(), modules_to_save=["pooler"])
    assert selected(model, ["*.attention.self.query", "classifier"]) == [
        PEFT_QUERY,
        "base_model.model.classifier.weight",
    ]
    # Of a module that is trained as a copy the copy counts, which merging puts in the original's place.
    assert selected(model, ["bert.pooler.dense"]) == [
        "base_model.model.bert.pooler.modules_to_save.default.dense.weight"
    ]


# Training


class Watch(TrainerCallback):
    """The zeros that the base had at first are +0.0 after every optimizer step."""

    def __init__(self, model):
        self.kept = {name: weight != 0 for name, weight in model.named_parameters() if name in selected(model)}
        self.steps = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = dict(model.named_parameters())
        assert all(exactly_positive_zero(parameters[name], kept) for name, kept in self.kept.items())
        self.steps += 1


def lora(seed=0, share=0.5):
    """For training: as peft begins, with an update of zero."""
    return attach(prune(bert(seed), share), task_type="SEQ_CLS", init_lora_weights=True)


def test_an_adapter_is_trained_on_a_pruned_base_and_resumed(tmp_path):
    models = {}
    for name in ("whole", "resumed"):
        models[name] = model = lora()
        before, watch = weights(model), Watch(model)
        if name == "resumed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
        trainer = make(tmp_path / name, model=model, callbacks=[watch], keep_zeros=True, **SAVING)
        trainer.train(resume_from_checkpoint=name == "resumed")
        assert watch.steps == (STEPS if name == "whole" else STEPS - 4)
        changed = {key for key, value in weights(model).items() if not torch.equal(value, before[key])}
        assert changed and all("lora_" in key or "modules_to_save" in key for key in changed)
    assert same(weights(models["resumed"]), weights(models["whole"]))
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "pruning_state.safetensors"} <= files and "model.safetensors" not in files

    trained = models["whole"]
    merged, report = merge_and_unload(trained)
    assert report.masked > 0
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert all(exactly_positive_zero(plain.get_parameter(name), kept) for name, kept in plain_masks(lora()).items())


def plain_masks(model):
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): kept
        for name, kept in Watch(model).kept.items()
    }


def test_a_frozen_base_is_pruned_by_magnitude_and_refused_by_gradient_criteria(tmp_path):
    options = {"target_sparsity": 0.5, "scope": "layer", **SCHEDULE}
    with pytest.raises(PruningConfigError, match=r'frozen.*\n?.*criterion="magnitude"'):
        make(tmp_path, model=lora(share=0), **options)
    model = lora(share=0)
    before = weights(model)
    trainer = make(tmp_path, model=model, criterion="magnitude", **options, **SAVING)
    trainer.train()
    for name, mask in trainer.sparsity_callback.pruner.masks.items():
        after, old = model.get_parameter(name).detach(), before[name]
        assert int((~mask).sum()) == mask.numel() // 2
        assert torch.equal(after, torch.where(mask, old, 0.0))  # frozen: pruned, and not trained
        assert old[~mask].abs().max() <= old[mask].abs().min()


def test_a_pruned_frozen_base_is_pruned_again_on_resume(tmp_path):
    """The checkpoint holds the adapter and the masks; the base comes dense, as at the start of the run."""
    options = {"target_sparsity": 0.6, "criterion": "magnitude", **SCHEDULE, **SAVING}
    whole = make(tmp_path / "whole", model=lora(share=0), **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    resumed = make(tmp_path / "resumed", model=lora(share=0), **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))


def test_sft_trainer_with_a_peft_config(tmp_path):
    library = SFT()
    model = prune(library.model())
    kept = {name: weight != 0 for name, weight in model.named_parameters() if name in selected(model)}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    callback = SparsityCallback(PruningConfig(keep_zeros=True))
    trainer = library.make(tmp_path, [callback], model=model, trainer_options={"peft_config": config})
    trainer.train()
    merged, report = merge_and_unload(trainer.model)
    assert [layer.name.split(".")[-2] for layer in report.layers] == ["q_proj", "down_proj"]
    assert all(exactly_positive_zero(merged.get_parameter(name), mask) for name, mask in kept.items())


# Merging


def update(layer, adapter="default", conv1d=False):
    """scaling * B A, by hand: outputs x inputs, or transposed."""
    product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    return (layer.scaling[adapter] * (product.t() if conv1d else product)).detach()


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merging_adds_the_update_where_the_base_is_not_zero(kind, safe_merge, caplog):
    if kind == "linear":
        model, name = attach(prune(bert())), QUERY
        layer = model.get_submodule(PEFT_QUERY.removesuffix(".base_layer.weight"))
    else:
        name = "transformer.h.0.attn.c_attn.weight"
        model = attach(prune(gpt2()), ["c_attn"], fan_in_fan_out=True)
        layer = model.get_base_model().transformer.h[0].attn.c_attn
    layer.get_base_layer().weight.data[0, 0] = -0.0  # a zero too, and +0.0 afterwards
    base, delta = layer.get_base_layer().weight.detach().clone(), update(layer, conv1d=kind == "conv1d")
    kept = base != 0
    merged, report = merge_and_unload(model, safe_merge=safe_merge)
    weight = merged.get_parameter(name)
    assert exactly_positive_zero(weight, kept)
    torch.testing.assert_close(weight.detach(), torch.where(kept, base + delta, 0.0))
    assert type(merged) in (type(bert()), type(gpt2()))
    assert not any("lora" in key for key in merged.state_dict())

    merged_layer = next(layer for layer in report.layers if layer.name == name)
    assert (merged_layer.weights, merged_layer.zeros) == (base.numel(), int((~kept).sum()))
    assert merged_layer.masked == int(((delta != 0) & ~kept).sum()) > 0
    assert merged_layer.norm_lost == pytest.approx(float(delta[~kept].norm() / delta.norm()), rel=1e-4)
    assert f"{report.masked:,} entries" in caplog.text and f"{100 * report.norm_lost:.1f}%" in caplog.text


def test_several_adapters_are_merged_and_only_those_that_are_named():
    models = []
    for names in (["default", "second"], ["second"], "second"):
        model = attach(prune(bert()), ["query"])
        torch.manual_seed(8)
        model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
        layer = model.get_submodule(PEFT_QUERY.removesuffix(".base_layer.weight"))
        base = layer.base_layer.weight.detach().clone()
        total = sum(update(layer, name) for name in ([names] if isinstance(names, str) else names))
        models.append(merge_and_unload(model, adapter_names=names)[0].get_parameter(QUERY).detach())
        torch.testing.assert_close(models[-1], torch.where(base != 0, base + total, 0.0))
    assert torch.equal(models[1], models[2]) and not torch.equal(models[0], models[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_merged_as_peft_merges_it_and_masked(dtype):
    merged = []
    for merge in (merge_and_unload, lambda model: (model.merge_and_unload(), None)):
        model = attach(prune(bert()), use_dora=True).to(dtype)
        kept = plain_masks(model)
        merged.append(merge(model)[0])
    ours, theirs = merged
    for name, weight in theirs.named_parameters():
        if name in kept:
            assert exactly_positive_zero(ours.get_parameter(name), kept[name])
            weight = torch.where(kept[name], weight, 0.0)
        assert torch.equal(ours.get_parameter(name), weight), name


def test_fused_experts_keep_their_zeros():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=20, num_key_value_heads=1, num_local_experts=3, head_dim=4, **sizes)
    base = prune(MixtralForCausalLM(config))
    kept = {name: base.get_parameter(name) != 0 for name in selected(base)}
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    merged, report = merge_and_unload(attach(base, [], target_parameters=parameters))
    assert [layer.name.split(".")[-1] for layer in report.layers] == ["gate_up_proj", "down_proj"]
    assert all(layer.masked and layer.masked == layer.zeros for layer in report.layers)
    assert all(exactly_positive_zero(merged.get_parameter(name), mask) for name, mask in kept.items())


def test_embeddings_biases_and_copies_are_not_held_at_zero():
    """Zeros there are no pruning: the padding's row, biases as they are initialized."""
    base = prune(bert())
    model = attach(base, ["query", "word_embeddings"], modules_to_save=["classifier"])
    copy = model.get_base_model().classifier.modules_to_save["default"].weight
    copy.data.add_(1.0)
    merged, report = merge_and_unload(model)
    assert [layer.name for layer in report.layers] == [QUERY]
    assert torch.equal(merged.classifier.weight, copy)
    assert merged.bert.embeddings.word_embeddings.weight[0].any()


def test_masks_replace_zeros_with_and_without_peft_names():
    for prefix in (True, False):
        model = attach(prune(bert()), ["query"])
        weight = model.get_parameter(PEFT_QUERY)
        mask = torch.ones_like(weight, dtype=torch.bool)
        mask.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = False
        merged, report = merge_and_unload(model, {PEFT_QUERY if prefix else QUERY: mask})
        assert report.total.zeros == 1
        assert int((merged.get_parameter(QUERY) == 0).sum()) == 1
    pruner = Pruner(attach(bert()), PruningConfig(target_sparsity=0.5, criterion="magnitude"))
    pruner.update(1, 1)
    merged, _ = merge_and_unload(pruner.model, pruner.masks)
    assert int((merged.bert.encoder.layer[0].output.dense.weight == 0).sum()) > 0


def test_merged_adapter_is_unmerged_on_exit():
    model = attach(prune(bert()))
    before, kept = weights(model), Watch(model).kept
    with merged_adapter(model) as report:
        assert all(exactly_positive_zero(model.get_parameter(name), mask) for name, mask in kept.items())
        assert report.masked and not torch.equal(model.get_parameter(PEFT_QUERY), before[PEFT_QUERY])
        inside = weights(model)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)
        assert name not in kept or exactly_positive_zero(weight, kept[name])
    merged, _ = merge_and_unload(model)
    torch.testing.assert_close(merged.get_parameter(QUERY).detach(), inside[PEFT_QUERY], rtol=0, atol=1e-6)


def test_a_refused_safe_merge_is_unmerged():
    model = attach(prune(bert()))
    before = weights(model)
    model.get_base_model().bert.encoder.layer[0].output.dense.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        merge_and_unload(model, safe_merge=True)
    torch.testing.assert_close(model.get_parameter(PEFT_QUERY).detach(), before[PEFT_QUERY], rtol=0, atol=1e-6)
    assert torch.equal(model.get_parameter(PEFT_QUERY) == 0, before[PEFT_QUERY] == 0)


# Refusals


def quantized(model):
    weight = model.get_parameter(PEFT_QUERY)
    weight.data = weight.data.to(torch.float8_e4m3fn)


def of_8_bits(model):
    model.get_base_model().quantization_method = "bitsandbytes"


WRONG = {
    "merged": (lambda model: model.merge_adapter(), {}, ValueError, r"default: already merged.*unmerge_adapter\(\)"),
    "float8": (quantized, {}, ValueError, r"the base is quantized \(.*query.*float8.*load the base in float32"),
    "quantized": (of_8_bits, {}, ValueError, r"the base is quantized \(bitsandbytes\)"),
    "meta": (lambda model: model.to("meta"), {}, NotImplementedError, r"\(meta, shape .*is sharded or offloaded"),
    "adapter": (None, {"adapter_names": ["x"]}, ValueError, r"adapter_names=\['x'\].*has the adapters default"),
    "none": (None, {"adapter_names": []}, ValueError, r"adapter_names=\[\]"),
    "name": (None, {"masks": {"bert.query": torch.ones(2) > 0}}, ValueError, r'"bert.query" is not a parameter'),
    "shape": (None, {"masks": {QUERY: torch.ones(2) > 0}}, ValueError, r"shape \(2,\) instead of"),
    "alive": (None, {"masks": {QUERY: torch.zeros(24, 24) > 0}}, ValueError, r"288 .*are not zero.*other weights"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_merges_are_refused_before_anything_changes(wrong):
    break_it, options, error, text = WRONG[wrong]
    model = attach(bert(), ["query", "dense"])
    model.get_parameter(PEFT_QUERY).data.view(-1)[::2] = 0
    if break_it:
        break_it(model)
    before = weights(model)
    with pytest.raises(error, match=re.compile(text, re.DOTALL)):
        merge_and_unload(model, **options)
    assert wrong == "meta" or same(weights(model), before)


def test_only_peft_models_with_layers_to_merge_are_accepted():
    with pytest.raises(TypeError, match="`model` is a BertForSequenceClassification, but must be a PeftModel"):
        merge_and_unload(bert())
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"the adapter \(PROMPT_TUNING\) changes no weights"):
        merge_and_unload(peft.get_peft_model(bert(), config))


def test_multihead_attention_is_refused_and_selected_without_error():
    model = attach(nn.Sequential(nn.MultiheadAttention(8, 2)), ["0"])
    assert find_layers(model) == []
    with pytest.raises(NotImplementedError, match="on a MultiheadAttention.*leave that module out"):
        merge_and_unload(model)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        merge_and_unload(bert())


def test_norm_lost_of_all_layers_is_that_of_the_joint_norm():
    layers = [MergedLayer("a", 8, 4, 4, 3.0, 3.0), MergedLayer("b", 8, 0, 0, 4.0, 0.0)]
    assert MergeReport(tuple(layers)).norm_lost == pytest.approx(3 / 5)
    assert MergeReport(()).norm_lost == 0.0
