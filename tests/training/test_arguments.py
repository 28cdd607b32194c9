"""SparseTrainingArguments through everything that reads and writes TrainingArguments."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
import yaml
from helpers.tiny import make
from transformers import HfArgumentParser, TrainingArguments

from hf_sparse import (
    PruningConfig,
    PruningConfigError,
    Scheduler,
    SparseTrainingArguments,
    SparsityCallback,
    register_scheduler,
)
from hf_sparse.training.arguments import SparseSeq2SeqTrainingArguments


RECIPE = {
    "prune_end": 0.6,
    "groups": {
        "attention": {"targets": ["*attention*"], "pattern": "4x1", "target_sparsity": 0.75, "scope": "layer"},
        "ffn": {"targets": ["re:dense"], "exclude": ["*attention*"], "pattern": "2:4"},
    },
}


@register_scheduler("halfway")
class Halfway(Scheduler):
    """Half of the target, and all of it at the last prune step."""

    def update_sparsity_ratio(self, aggressive_ratio, current_prune_step, total_prune_steps, masks):
        return aggressive_ratio / (1 if current_prune_step >= total_prune_steps else 2)


def parse(*line, cls=SparseTrainingArguments):
    return HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu", *line])[0]


def test_no_default_changes():
    ours = {field.name: field.default for field in dataclasses.fields(SparseTrainingArguments)}
    for parent in (TrainingArguments, PruningConfig):
        for field in dataclasses.fields(parent):
            assert ours[field.name] == field.default or field.default_factory is not dataclasses.MISSING
    assert not {field.name for field in dataclasses.fields(TrainingArguments)} & {
        field.name for field in dataclasses.fields(PruningConfig)
    }


def test_options_that_prune_nothing_are_refused(tmp_path):
    """Before the first step: a target may be set until then."""
    for trainer in (
        make(tmp_path, pattern="4x1"),
        make(tmp_path, callbacks=[SparsityCallback(PruningConfig(pattern="4x1"))]),
    ):
        with pytest.raises(
            PruningConfigError, match="^`pattern` has no effect, because nothing is pruned: give `target_"
        ):
            trainer.train()
        assert trainer.state.global_step == 0


def test_the_command_line():
    args = parse(
        "--target_sparsity", "0.8", "--criterion", "greedy_movement", "--prune-end", "0.5", "--prune_every", "20",
        "--targets", "*.query", "re:.*key", "--keep_zeros", "--learning_rate", "1e-3", "--groups",
        '{"a": {"targets": ["*.dense"]}}',
    )  # fmt: skip
    assert (args.target_sparsity, args.criterion, args.prune_end, args.prune_every) == (
        0.8,
        "greedy_movement",
        0.5,
        20,
    )
    assert (args.targets, args.keep_zeros, args.learning_rate) == (["*.query", "re:.*key"], True, 1e-3)
    assert args.groups == {"a": {"targets": ["*.dense"]}}
    assert parse().target_sparsity is None


def test_help_tells_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        HfArgumentParser(SparseTrainingArguments).parse_args_into_dataclasses(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(PruningConfig):
        assert f"--{field.name}" in text
        assert field.metadata["help"].split(",")[0].split("\n")[0][:20] in " ".join(text.split())


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files(tmp_path, suffix):
    values = {"output_dir": "out", "use_cpu": True, "target_sparsity": 0.5, "targets": ["*.query"], **RECIPE}
    path = tmp_path / f"args.{suffix}"
    path.write_text(json.dumps(values) if suffix == "json" else yaml.safe_dump(values))
    parser = HfArgumentParser(SparseTrainingArguments)
    args = (parser.parse_json_file if suffix == "json" else parser.parse_yaml_file)(str(path))[0]
    assert {name: getattr(args, name) for name in values} == values
    assert args == parser.parse_dict(values)[0] != parser.parse_dict(values | {"target_sparsity": 0.6})[0]


def test_a_recipe_prunes_its_groups(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    args = parse("--pruning_config", str(path), "--criterion", "snip_momentum")
    assert (args.groups, args.prune_end, args.criterion) == (RECIPE["groups"], 0.6, "snip_momentum")

    trainer = make(tmp_path, pruning_config=str(path), scope="layer")
    trainer.train()
    layers = {
        (layer.group, layer.pattern, layer.sparsity) for layer in trainer.sparsity_callback.pruner.report().layers
    }
    assert layers == {("attention", "4x1", 0.75), ("ffn", "2:4", 0.5)}


def test_an_unknown_option_of_a_recipe_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("target_sparsty: 0.5\n")
    with pytest.raises(PruningConfigError, match='"target_sparsty".*"target_sparsity"'):
        parse("--pruning_config", str(path))


@pytest.mark.parametrize("cls", [SparseTrainingArguments, SparseSeq2SeqTrainingArguments])
def test_json_round_trip(cls):
    options = {"target_sparsity": 0.8, "exclude": ["*.pooler"], "groups": RECIPE["groups"]}
    args = cls("out", use_cpu=True, hub_token="secret", **options)
    values = json.loads(args.to_json_string())
    assert {field.name for field in dataclasses.fields(cls) if field.init} == values.keys()
    values = {name: value for name, value in values.items() if not name.endswith("_token")}
    again = HfArgumentParser(cls).parse_dict(values)[0]
    again.hub_token = args.hub_token
    assert again == args


def test_no_text_of_the_arguments_shows_a_token():
    args = SparseTrainingArguments("out", use_cpu=True, target_sparsity=0.8, hub_token="secret")
    for text in (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "secret" not in text
        assert "target_sparsity" in text


def test_copies():
    args = SparseTrainingArguments("out", use_cpu=True, target_sparsity=0.8, groups=RECIPE["groups"])
    assert copy.deepcopy(args) == pickle.loads(pickle.dumps(args)) == args
    assert dataclasses.replace(args, target_sparsity=0.5).target_sparsity == 0.5


def test_all_errors_are_reported_together():
    with pytest.raises(PruningConfigError) as caught:
        parse("--scheduler", "iterativ", "--target_sparsity", "1.2", "--sparsity_decay_type", "cubi")
    text = str(caught.value)
    assert len(caught.value.errors) == 3
    assert '`scheduler` is "iterativ"' in text and 'Did you mean "iterative"?' in text
    assert '"cubic"' in text and "`target_sparsity` is 1.2" in text


def test_a_registered_scheduler_is_chosen_by_its_name(tmp_path):
    assert parse("--scheduler", "halfway").scheduler == "halfway"
    trainer = make(tmp_path, scheduler="halfway", target_sparsity=0.5, prune_start=2, prune_end=6, prune_every=2)
    trainer.train()
    figures = {log["step"]: log["sparsity"] for log in trainer.state.log_history if "sparsity" in log}
    assert [figures[step] for step in (1, 2, 5, 6, 10)] == [0, 0.25, 0.25, 0.5, 0.5]


def test_the_arguments_in_a_checkpoint_are_ours(tmp_path):
    make(tmp_path, target_sparsity=0.5, max_steps=2, save_strategy="steps", save_steps=2).train()
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert type(saved) is SparseTrainingArguments and saved.target_sparsity == 0.5


def test_the_output_folder_may_be_left_out():
    ours = SparseTrainingArguments(target_sparsity=0.5, use_cpu=True)
    assert ours.output_dir == TrainingArguments(use_cpu=True).output_dir
