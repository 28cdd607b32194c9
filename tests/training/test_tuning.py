"""Training few parameters of a pruned model: which ones, zeros, resuming, cards, and what is refused."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.sparse import KeptZeros, pruned, tuned
from helpers.tiny import arguments, bert, content, make, same, samples, weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, HfArgumentParser, Trainer

from hf_sparse import (
    CheckpointError,
    PruningConfig,
    PruningConfigError,
    SparseTrainer,
    SparseTrainingArguments,
    SparsityCallback,
    Tuning,
    register_tune,
)
from hf_sparse.files import TUNING_FILE
from hf_sparse.training.tuning.biases import Biases
from hf_sparse.training.tuning.masked_lora import MaskedLora
from hf_sparse.training.tuning.norms import Norms
from hf_sparse.training.tuning.parameters import bias_parameters, head_parameters, norm_parameters


TUNINGS = ("norms", "biases", "masked_lora")


# Names that end with these are normalization; all others are not.
NORMS = {
    "bert": ("LayerNorm.weight", "LayerNorm.bias"),
    "gpt2": ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "ln_f.weight", "ln_f.bias"),
    "llama": ("norm.weight", "layernorm.weight"),
    "qwen3_moe": ("norm.weight", "layernorm.weight"),
    "t5": ("layer_norm.weight",),
    "vit": ("layernorm_before.weight", "layernorm_before.bias", "layernorm_after.weight", "layernorm_after.bias",
            "vit.layernorm.weight", "vit.layernorm.bias"),
}  # fmt: skip
HEADS = {"bert": {"classifier.weight", "classifier.bias"}, "vit": {"classifier.weight", "classifier.bias"}}


@pytest.mark.parametrize("name", NORMS)
def test_roles_of_parameters(name):
    model = ARCHITECTURES[name].model()
    names = [parameter for parameter, _ in model.named_parameters()]
    assert norm_parameters(model) == {parameter for parameter in names if parameter.endswith(NORMS[name])}
    assert bias_parameters(model) == {parameter for parameter in names if parameter.endswith(".bias")}
    assert head_parameters(model) == HEADS.get(name, set())
    assert len(norm_parameters(model)) >= 2


def test_norms_without_a_norm_in_their_name_and_biases_of_experts():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.activation = nn.Parameter(torch.ones(4)), None

    model = nn.ModuleDict({"a": Scaled(), "b": nn.Linear(4, 4), "c": nn.PReLU(), "d": nn.BatchNorm2d(4)})
    assert norm_parameters(model) == {"a.weight", "d.weight", "d.bias"}
    experts = {name for name in bias_parameters(ARCHITECTURES["gpt_oss"].model()) if "experts" in name}
    assert {name.rpartition(".")[2] for name in experts} == {"gate_up_proj_bias", "down_proj_bias"}


def test_output_embeddings_are_no_head():
    model = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    heads = head_parameters(model)
    assert heads and all("transform" in name for name in heads)


TRAINED = {
    "norms": lambda model: norm_parameters(model) | head_parameters(model),
    "biases": lambda model: bias_parameters(model) | head_parameters(model),
    Norms(train_head=False): norm_parameters,
    Biases(train_norms=True, train_head=False): lambda model: norm_parameters(model) | bias_parameters(model),
}


@pytest.mark.parametrize("tune", TRAINED, ids=str)
def test_only_these_parameters_are_trained(tmp_path, tune):
    trainer = tuned(tmp_path, tune=tune)
    before = weights(trainer.model)
    trainer.train()
    after, expected = weights(trainer.model), TRAINED[tune](trainer.model)
    assert {name for name in after if not same({"": after[name]}, {"": before[name]})} == expected
    assert {id(value) for value in trainer.optimizer.state} == {id(trainer.model.get_parameter(n)) for n in expected}
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert trainer.tuner.num_trained == sum(after[name].numel() for name in expected)


def test_frozen_parameters_stay_frozen(tmp_path):
    model = pruned()
    frozen = {name for name, _ in model.named_parameters() if "attention" in name or "classifier" in name}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for tune in TUNINGS:
        trainer, before = tuned(tmp_path, model, tune=tune), weights(model)
        trainer.train()
        assert same({name: weights(model)[name] for name in frozen}, {name: before[name] for name in frozen})
        assert not same(weights(model), before)
        assert {name for name, value in model.named_parameters() if not value.requires_grad} == frozen


@pytest.mark.parametrize("tune", TUNINGS)
@pytest.mark.parametrize("options", [{}, {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}])
def test_zeros_hold_at_every_event_and_in_every_file(tmp_path, tune, options):
    trainer = tuned(tmp_path, tune=tune, save_strategy="steps", save_steps=3, **options)
    spy = KeptZeros(trainer.model)
    trainer.add_callback(spy)
    trainer.train()
    trainer.save_model()
    assert spy.events > 20
    for folder in (tmp_path, *(tmp_path / f"checkpoint-{step}" for step in (3, 6, 9, 10))):
        saved = AutoModelForSequenceClassification.from_pretrained(folder)
        assert saved.state_dict().keys() == bert().state_dict().keys()
        for name, mask in spy.masks.items():
            assert torch.equal(saved.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("tune", TUNINGS)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, tune):
    options = {"tune": tune, "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    whole = tuned(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = tuned(tmp_path / "resumed", bert(seed=5), **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    checkpoints = [tmp_path / name / "checkpoint-8" for name in ("whole", "resumed")]
    assert content(checkpoints[0]) == content(checkpoints[1])
    assert same(*(load_file(checkpoint / TUNING_FILE) for checkpoint in checkpoints))


def test_what_is_trained_is_logged_and_in_the_card(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_sparse")
    trainer = tuned(tmp_path, tune=MaskedLora(rank=2))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    layers = 4 * 2 * (24 + 24) + 2 * 2 * (24 + 40)  # query, key, value, output; up, down
    others = norm_parameters(trainer.model) | bias_parameters(trainer.model) | head_parameters(trainer.model)
    count = layers + sum(trainer.model.get_parameter(name).numel() for name in others)
    total = trainer.model.num_parameters()
    text = f"{count:,} values trained, {count / total:.2%} of {total:,} parameters"
    assert text in caplog.text and text in (tmp_path / "README.md").read_text()
    assert '"rank"' not in caplog.text and "rank=2" in (tmp_path / "README.md").read_text().replace("\\", "")


def test_a_later_training_starts_anew(tmp_path):
    """From the present weights, with its own optimizer; without `tune` it trains all parameters."""
    trainer = tuned(tmp_path, tune="masked_lora", max_steps=3)
    trainer.train()
    first, optimizer = weights(trainer.model), trainer.optimizer
    trainer.args.tune = "norms"
    trainer.train()
    second = weights(trainer.model)
    assert trainer.optimizer is not optimizer
    changed = {name for name in second if not same({"": first[name]}, {"": second[name]})}
    assert changed == norm_parameters(trainer.model) | head_parameters(trainer.model)
    trainer.args.tune = None
    trainer.train()
    third = weights(trainer.model)
    assert all(not same({"": second[name]}, {"": third[name]}) for name in second if "position_ids" not in name)
    assert trainer.tuner is None
    selected = [name for name in third if name in trainer.sparsity_callback.pruner.masks]
    assert all(torch.equal(first[name] == 0, third[name] == 0) for name in selected)


# Refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tune": "masked_lara"}, '`tune` is "masked_lara": known are biases, masked_lora, norms. Did you mean'),
        ({"tune": "masked_lora", "tune_kwargs": {"rnk": 2}}, 'has no option "rnk"'),
        ({"tune": "masked_lora", "tune_kwargs": {"rank": 0}}, '"rank" is 0: it must be at least 1'),
        ({"tune": "masked_lora", "tune_kwargs": '{"rank": "a"}'}, "it must be a whole number"),
        ({"tune": "masked_lora", "tune_kwargs": "{"}, "it must be a JSON object"),
        ({"tune_kwargs": {"rank": 2}}, "`tune_kwargs` needs `tune`"),
        ({"tune": MaskedLora(2), "tune_kwargs": {"rank": 2}}, "leave `tune_kwargs` out"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(PruningConfigError, match=message):
        SparseTrainingArguments(str(tmp_path), use_cpu=True, keep_zeros=True, **options)


def test_options_on_the_command_line(tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--keep_zeros", "--tune", "masked_lora"]
    args = HfArgumentParser(SparseTrainingArguments).parse_args([*line, "--tune_kwargs", '{"rank": 4}'])
    (args,) = HfArgumentParser(SparseTrainingArguments).parse_args_into_dataclasses(
        [*line, "--tune_kwargs", '{"rank": 4}']
    )
    assert args.tuning() == MaskedLora(rank=4)
    given = SparseTrainingArguments(str(tmp_path), use_cpu=True, keep_zeros=True, tune=MaskedLora(rank=4))
    assert (given.tune, given.tune_kwargs) == (args.tune, args.tune_kwargs) == ("masked_lora", {"rank": 4})
    assert json.loads(given.to_json_string())["tune_kwargs"] == {"rank": 4}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_sparsity": 0.8}, "prune first, and then train with `keep_zeros=True`"),
        ({"pattern": "2:4"}, "without a pattern that implies one"),
        ({"keep_zeros": False}, "set `keep_zeros=True`"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
@pytest.mark.parametrize("tune", ["norms", "masked_lora"])
def test_runs_that_cannot_be_tuned(tmp_path, tune, options, message):
    with pytest.raises(PruningConfigError, match=message):
        tuned(tmp_path, tune=tune, **options).train()


def test_models_and_optimizers_that_cannot_be_tuned(tmp_path):
    model = ARCHITECTURES["llama"].model()
    with pytest.raises(PruningConfigError, match='LlamaForCausalLM has no such parameters.* or `tune="norms"`'):
        tuned(tmp_path, model, tune="biases")
    model = pruned()
    optimizers = torch.optim.SGD(model.parameters()), None
    with pytest.raises(PruningConfigError, match="leave optimizers out"):
        tuned(tmp_path, model, tune="norms", trainer_options={"optimizers": optimizers})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="that are not frozen"):
        tuned(tmp_path, model, tune="norms").train()
    with pytest.raises(ValueError, match="`tune` needs SparseTrainer"):
        args = arguments(tmp_path, keep_zeros=True, tune="norms")
        Trainer(pruned(), args, train_dataset=samples(), callbacks=[SparsityCallback()]).train()


def test_a_model_with_adapters_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pruned(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(PruningConfigError, match="the model has adapters"):
        tuned(tmp_path, model, tune="masked_lora")


def test_checkpoints_of_other_tunings_are_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    tuned(tmp_path / "lora", tune="masked_lora", **options).train()
    tuned(tmp_path / "plain", **options).train()
    checkpoints = {name: str(tmp_path / name / "checkpoint-5") for name in ("lora", "plain")}
    with pytest.raises(CheckpointError, match="by a run with `tune`, and this run is without"):
        tuned(tmp_path, **options).train(checkpoints["lora"])
    with pytest.raises(CheckpointError, match="by a run without `tune`"):
        tuned(tmp_path, tune="norms", **options).train(checkpoints["plain"])
    for tune in ("norms", MaskedLora(rank=2)):
        with pytest.raises(CheckpointError, match="the tuning differs"):
            tuned(tmp_path, tune=tune, **options).train(checkpoints["lora"])


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_tuning_file_is_refused(tmp_path, damage, caplog):
    options = {"tune": "masked_lora", "save_strategy": "steps", "save_steps": 5}
    tuned(tmp_path, **options).train()
    path = tmp_path / "checkpoint-10" / TUNING_FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 64
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{TUNING_FILE} is damaged"):
        tuned(tmp_path, **options).train(str(path.parent))
    resumed = tuned(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from.endswith("checkpoint-5") and TUNING_FILE in caplog.text


# Plug-ins


def test_a_tuning_of_a_user(tmp_path):
    """Its own update of weights: one scale for each output."""

    class RowScale(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.scale, self.ones = nn.Parameter(torch.zeros(rows, 1)), torch.ones(rows, 1)

        def forward(self):
            return (self.scale * self.ones).expand(-1, 24)

    @register_tune("shifts")
    @dataclass(frozen=True)
    class Shifts(Tuning):
        """Adds one number to each row of the queries."""

        bias: bool = False
        updates_weights = True

        def trained_parameters(self, model):
            return {name for name in bias_parameters(model) if "classifier" in name} if self.bias else set()

        def new_update(self, layer, generator):
            return RowScale(24) if "query" in layer.name else None

    trainer = tuned(tmp_path, tune="shifts", tune_kwargs={"bias": True})
    before = weights(trainer.model)
    trainer.train()
    changed = {name: value - before[name] for name, value in weights(trainer.model).items()}
    assert {name for name, change in changed.items() if change.any()} == {
        "bert.encoder.layer.0.attention.self.query.weight",
        "classifier.bias",
    }
    query = "bert.encoder.layer.0.attention.self.query.weight"
    for row, kept in zip(changed[query], before[query] != 0, strict=True):
        assert torch.allclose(row[kept], row[kept][0].expand(int(kept.sum())), atol=1e-6) and not row[~kept].any()


def test_a_callback_says_what_is_tuned(tmp_path):
    """For trainers with arguments of their own."""
    callback = SparsityCallback(PruningConfig(keep_zeros=True), tune=MaskedLora(rank=2))
    trainer = make(tmp_path, model=pruned(), callbacks=[callback], trainer=SparseTrainer)
    trainer.train()
    assert trainer.tuner.tuning == MaskedLora(rank=2) and len(trainer.tuner.layers) == 6
