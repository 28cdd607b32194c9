"""The trainer: what it was without pruning, the same signature, the figures in every log, the files at the end."""

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import SCHEDULE, STEPS, arguments, bert, figures, gpt2, make, same, samples, weights, zeros
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sparse import (
    PruningConfig,
    PruningConfigError,
    Scheduler,
    SparseSeq2SeqTrainer,
    SparseTrainer,
    SparseTrainerMixin,
    SparseTrainingArguments,
    SparsityCallback,
    register_scheduler,
)
from hf_sparse.training.arguments import SparseSeq2SeqTrainingArguments


# The trainer that it was


EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 5}


@pytest.mark.parametrize("target", [None, 0.0, "plain arguments"])
def test_with_nothing_to_prune_it_is_trainer_bit_for_bit(tmp_path, target):
    plain = make(tmp_path / "plain", Trainer, **EVALUATED)
    expected = plain.train()
    if target == "plain arguments":
        trainer = make(tmp_path / "sparse", SparseTrainer, **EVALUATED)
        assert type(trainer.args) is TrainingArguments
    else:
        args = arguments(tmp_path / "sparse", SparseTrainingArguments, target_sparsity=target, **EVALUATED)
        trainer = SparseTrainer(bert(), args, train_dataset=samples(), eval_dataset=samples()[:8])
    result = trainer.train()

    assert same(weights(trainer.model), weights(plain.model))
    assert figures(trainer.state.log_history) == figures(plain.state.log_history)
    assert result.metrics.keys() == expected.metrics.keys()
    assert result.training_loss == expected.training_loss
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in tmp_path.iterdir()]
    assert files[0] == files[1]


def test_the_metrics_that_train_and_evaluate_return_have_the_keys_of_trainer(tmp_path):
    plain, sparse = make(tmp_path / "plain", Trainer), make(tmp_path / "sparse", target_sparsity=0.5)
    assert sparse.train().metrics.keys() == plain.train().metrics.keys()  # epoch too, which `log` adds
    assert sparse.evaluate().keys() == plain.evaluate().keys()


def test_signatures_are_those_of_the_trainers():
    class Own(SparseTrainerMixin, Trainer):
        def __init__(self, model, extra, **kwargs):
            super().__init__(model, **kwargs)

    class Derived(SparseTrainer):
        pass

    assert inspect.signature(SparseTrainer) == inspect.signature(Trainer) == inspect.signature(Derived)
    assert inspect.signature(SparseSeq2SeqTrainer) == inspect.signature(Seq2SeqTrainer)
    assert list(inspect.signature(Own).parameters) == ["model", "extra", "kwargs"]
    names = list(inspect.signature(Trainer.train).parameters)[:2]
    assert list(inspect.signature(SparseTrainer.train).parameters)[:2] == names


def test_arguments_work_by_position(tmp_path):
    args = arguments(tmp_path, target_sparsity=0.5)
    trainer = SparseTrainer(bert(), args, lambda rows: torch.utils.data.default_collate(rows), samples(4))
    assert trainer.train_dataset == samples(4)
    assert trainer.sparsity_callback.config is args


# Other trainers


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **config))


@pytest.mark.parametrize("kind", ["arguments", "callback", "callback in a stock trainer"])
def test_sequence_to_sequence(tmp_path, kind):
    own = kind == "arguments"
    options = {"target_sparsity": 0.5} if own else {}
    cls = SparseSeq2SeqTrainingArguments if own else Seq2SeqTrainingArguments
    args = arguments(tmp_path, cls, predict_with_generate=True, max_steps=4, **options)
    trainer_class = Seq2SeqTrainer if kind.endswith("stock trainer") else SparseSeq2SeqTrainer
    callbacks = None if own else [SparsityCallback(PruningConfig(target_sparsity=0.5))]
    data = samples(8, language=True)
    trainer = trainer_class(t5(), args, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks)
    trainer.train()
    assert "eval_loss" in trainer.evaluate(max_length=6)
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["sparsity_of_selected"] == 0.5
    assert zeros(trainer.model) == report["parameter_zeros"] == report["selected_zeros"]


class WeightedTrainer(Trainer):
    """Somebody's trainer, with arguments of its own."""

    def __init__(self, *args, weight=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = weight

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return (loss[0] * self.weight, loss[1]) if isinstance(loss, tuple) else loss * self.weight

    def evaluate(self, eval_dataset=None, eval_examples=None, **kwargs):
        return super().evaluate(eval_dataset, **kwargs) | {"eval_examples": len(eval_examples or ())}


class SparseWeightedTrainer(SparseTrainerMixin, WeightedTrainer):
    pass


def test_mixed_into_somebodys_trainer(tmp_path):
    trainer = make(tmp_path, SparseWeightedTrainer, trainer_options={"weight": 0.0}, target_sparsity=0.5)
    assert list(inspect.signature(SparseWeightedTrainer).parameters) == ["args", "weight", "kwargs"]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert trainer.evaluate(samples(4), [1, 2])["eval_examples"] == 2
    assert zeros(trainer.model) == 2112


def test_a_config_by_callback(tmp_path):
    given = SparsityCallback(PruningConfig(target_sparsity=0.5))
    trainer = make(tmp_path, callbacks=[given])
    assert trainer.sparsity_callback is given
    trainer.train()
    assert zeros(trainer.model) == 2112


def test_a_config_by_callback_and_by_arguments_is_refused(tmp_path):
    given = SparsityCallback(PruningConfig(target_sparsity=0.5))
    with pytest.raises(ValueError, match="given twice"):
        make(tmp_path, callbacks=[given], target_sparsity=0.7)
    with pytest.raises(ValueError, match="given twice"):
        make(tmp_path, callbacks=[given, SparsityCallback(PruningConfig(target_sparsity=0.7))])


def test_a_callback_class_takes_the_arguments(tmp_path):
    trainer = make(tmp_path, callbacks=[SparsityCallback], target_sparsity=0.5)
    assert sum(isinstance(callback, SparsityCallback) for callback in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert zeros(trainer.model) == 2112


def test_a_callback_that_prunes_nothing_leaves_resume_to_trainer(tmp_path):
    make(tmp_path, Trainer, max_steps=5, save_strategy="steps", save_steps=5).train()
    trainer = make(tmp_path, callbacks=[SparsityCallback(PruningConfig())])
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS


# Before training


def test_a_config_that_does_not_fit_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(PruningConfigError) as caught:
        make(tmp_path, model=bert(hidden_size=26), target_sparsity=0.5, pattern="4x1", exclude=["nonsense"])
    errors = caught.value.errors
    assert any('"nonsense" matches none' in error_text for error_text in errors)
    assert sum("has 26 outputs" in error_text for error_text in errors) == 5  # all but the pooler, each by name


def test_a_stock_trainer_with_the_callback_refuses_it_then_too(tmp_path):
    with pytest.raises(PruningConfigError, match="nonsense"):
        make(tmp_path, Trainer, callbacks=[SparsityCallback(PruningConfig(target_sparsity=0.5, targets=["nonsense"]))])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prune_end": STEPS + 1}, f"`prune_end` is step {STEPS + 1}, but training has {STEPS} optimizer steps"),
        ({"prune_start": 15, "prune_end": 20}, "`prune_start` is step 15, but training has"),
        ({"prune_start": 8, "prune_end": 0.5}, "`prune_start` is step 8 and `prune_end` is step 5"),
    ],
)
def test_a_schedule_that_ends_after_training_is_refused_before_any_step(tmp_path, options, message):
    trainer = make(tmp_path, target_sparsity=0.5, **options)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same(before, weights(trainer.model))


def test_schedule_free_optimizers_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match='`optim="schedule_free_adamw"` .*use `optim="adamw_torch"`'):
        make(tmp_path, target_sparsity=0.5, optim="schedule_free_adamw")
    make(tmp_path, target_sparsity=0.0, optim="schedule_free_adamw")


# Figures


def test_sparsity_and_target_are_logged_at_each_logging_step(tmp_path, capsys):
    trainer = make(tmp_path, target_sparsity=0.5, report_to="tensorboard", logging_steps=2, **SCHEDULE)
    seen = {}

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = zeros(model) / 4224

    trainer.add_callback(Counter)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # 0.5 * (1 - (1 - c/4)**3) after prune steps c = 0, 1, 2, 3, 4, which are at 3, 5, 7 and 8.
    expected = {2: 0.0, 4: 0.289062, 6: 0.4375, 8: 0.5, 10: 0.5}
    assert {log["step"]: log["target_sparsity"] for log in logs} == pytest.approx(expected)
    assert {log["step"]: log["sparsity"] for log in logs} == {step: round(seen[step], 6) for step in expected}
    assert all("sparsity" not in log for log in trainer.state.log_history if "loss" not in log)

    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(lines) == 5
    assert all("'sparsity'" in line and "'target_sparsity'" in line for line in lines)

    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    for name in ("sparsity", "target_sparsity"):
        read = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert read == pytest.approx({log["step"]: log[name] for log in logs})


@pytest.mark.parametrize("kind", ["second train", "kept zeros", "lower target"])
def test_the_target_does_not_start_below_what_is_pruned(tmp_path, kind):
    trainer = make(tmp_path, target_sparsity=0.5, keep_zeros=kind == "kept zeros", scope="layer", **SCHEDULE)
    if kind == "kept zeros":
        for weight in trainer.model.bert.parameters():
            weight.data.view(-1)[::4] = 0
    else:
        trainer.train()
        trainer.args.target_sparsity = 0.3 if kind == "lower target" else 0.75
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    start, end = {"second train": (0.5, 0.75), "kept zeros": (0.25, 0.5), "lower target": (0.5, 0.5)}[kind]
    assert (logs[0]["target_sparsity"], logs[-1]["target_sparsity"]) == (start, end)
    for log in logs:
        assert log["target_sparsity"] == pytest.approx(log["sparsity"], abs=1e-3)
        assert type(log["target_sparsity"]) is type(log["sparsity"]) is float


def test_a_resumed_run_logs_the_target_of_an_uninterrupted_one(tmp_path):
    options = {"target_sparsity": 0.75, "keep_zeros": True, "save_strategy": "steps", "save_steps": 5, **SCHEDULE}
    logs = []
    for resume in (False, True):
        model = bert()
        for weight in model.bert.parameters():
            weight.data.view(-1)[::2] = 0
        trainer = make(tmp_path, model=model, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resume else None)
        logs.append([log["target_sparsity"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == logs[1] and logs[0][0] >= 0.5


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, int])
def test_figures_are_plain_floats_whatever_a_scheduler_returns(tmp_path, number):
    @register_scheduler("typed")
    class Typed(Scheduler):
        def update_sparsity_ratio(self, aggressive_ratio, current_prune_step, total_prune_steps, masks):
            return number(aggressive_ratio if current_prune_step == total_prune_steps else 0)

    target = 1 if number is int else 0.5
    trainer = make(tmp_path, target_sparsity=target, scheduler="typed", scope="layer", **SCHEDULE)
    trainer.train()
    trainer.save_state()
    logs = [log for log in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] if "loss" in log]
    assert [log["target_sparsity"] for log in logs] == [0.0] * 7 + [target] * 3
    for log in trainer.state.log_history:
        assert all(type(value) in (int, float) for value in log.values())
        assert "loss" not in log or type(log["target_sparsity"]) is float


@pytest.mark.parametrize("value", [None, "half", torch.zeros(2), float("nan"), -0.1])
def test_a_scheduler_that_returns_no_sparsity_is_named(tmp_path, value):
    @register_scheduler("wrong")
    class Wrong(Scheduler):
        def update_sparsity_ratio(self, aggressive_ratio, current_prune_step, total_prune_steps, masks):
            return value

    with pytest.raises(ValueError, match="Wrong returns .* at prune step 1 of 4: it must be"):
        make(tmp_path, target_sparsity=0.5, scheduler="wrong", **SCHEDULE).train()


def test_a_stock_trainer_with_the_callback_logs_them_too(tmp_path, capsys):
    callback = SparsityCallback(PruningConfig(target_sparsity=0.5, **SCHEDULE))
    trainer = make(tmp_path, Trainer, callbacks=[callback])
    trainer.train()
    sparse = make(tmp_path, target_sparsity=0.5, **SCHEDULE)
    sparse.train()
    assert figures(trainer.state.log_history) == figures(sparse.state.log_history)
    assert capsys.readouterr().out.count("'target_sparsity'") == 2 * STEPS


def test_the_table_is_printed_once_and_the_report_is_counted_in_the_weights(tmp_path, capsys, plots):
    trainer = make(tmp_path, target_sparsity=0.5)
    trainer.train()
    assert capsys.readouterr().out.count("selected                    ") == 1
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    parameters = dict(trainer.model.named_parameters())
    assert len(report["layers"]) == 6
    for layer in report["layers"]:
        assert layer["zeros"] == int((parameters[layer["name"]] == 0).sum())
        assert layer["weights"] == parameters[layer["name"]].numel()
    assert report["parameters"] == sum(weight.numel() for weight in parameters.values())
    assert report["parameter_zeros"] == sum(int((weight == 0).sum()) for weight in parameters.values())
    for name in ("pruning_schedule.png", "pruning_layers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_only_the_main_process_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    trainer = make(tmp_path, target_sparsity=0.5, save_strategy="steps", save_steps=5)

    class OtherProcess(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = False

    trainer.add_callback(OtherProcess)
    trainer.train()
    assert zeros(trainer.model) == 2112
    assert "selected" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*") if "pruning" in path.name] == []


# Saving


def test_a_saved_model_has_config_and_report_but_no_masks(tmp_path):
    trainer = make(tmp_path / "run", target_sparsity=0.5)
    trainer.save_model(str(tmp_path / "before"))
    trainer.train()
    for folder in (tmp_path / "model", tmp_path / f"checkpoint-{STEPS}"):  # the user's names are the user's
        trainer.save_model(str(folder))
        names = {path.name for path in folder.iterdir()}
        assert {"pruning_config.json", "pruning_report.json", "model.safetensors"} <= names
        assert "pruning_state.safetensors" not in names
        assert PruningConfig.from_file(folder / "pruning_config.json") == PruningConfig(target_sparsity=0.5)
    assert not any("pruning" in path.name for path in (tmp_path / "before").iterdir())


def test_saving_a_model_into_a_checkpoint_does_not_harm_it(tmp_path):
    trainer = make(tmp_path, target_sparsity=0.5, save_strategy="steps", save_steps=STEPS)
    trainer.train()
    trainer.save_model(str(tmp_path / f"checkpoint-{STEPS}"))
    assert (tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").is_file()


def test_masks_are_there_before_the_weights_so_that_an_upload_finds_them(tmp_path):
    found = []

    class Uploading(Trainer):
        def save_model(self, output_dir=None, _internal_call=False):
            found.append(sorted(path.name for path in Path(output_dir).iterdir()))
            super().save_model(output_dir, _internal_call)

    class SparseUploading(SparseTrainerMixin, Uploading):
        pass

    make(tmp_path, SparseUploading, target_sparsity=0.5, save_strategy="steps", save_steps=STEPS).train()
    assert found == [["pruning_config.json", "pruning_report.json", "pruning_state.safetensors"]]


def test_a_checkpoint_of_gpt2_has_the_keys_of_the_model(tmp_path):
    trainer = make(tmp_path, model=gpt2(), target_sparsity=0.5, save_strategy="steps", save_steps=STEPS)
    trainer.train()
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    plain = make(tmp_path / "plain", Trainer, model=gpt2(), save_strategy="steps", save_steps=STEPS)
    plain.train()
    assert saved.keys() == load_file(tmp_path / "plain" / f"checkpoint-{STEPS}" / "model.safetensors").keys()


# Stopping early


@pytest.mark.parametrize("added", ["with the others", "afterwards"])
def test_early_stopping_waits_for_the_final_sparsity(tmp_path, added):
    """A metric that gets worse during pruning does not count."""
    calls = iter(range(100))
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "max_steps": 16}
    callbacks = [EarlyStoppingCallback(2)]
    trainer = make(
        tmp_path,
        target_sparsity=0.5,
        callbacks=callbacks if added == "with the others" else None,
        trainer_options={"compute_metrics": lambda prediction: {"score": -next(calls)}},
        **options | SCHEDULE,
    )
    if added == "afterwards":
        trainer.add_callback(callbacks[0])
    trainer.train()
    assert trainer.state.global_step == SCHEDULE["prune_end"] + 2
    assert trainer.state.best_global_step == SCHEDULE["prune_end"]


def test_training_that_stops_before_the_target_says_so(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    with caplog.at_level(logging.WARNING, "hf_sparse"):
        trainer = make(tmp_path, target_sparsity=0.5, callbacks=[Stop()], **SCHEDULE)
        trainer.train()
    assert "ended at step 4, before `prune_end` (step 8): the target was not reached" in caplog.text
    trainer.evaluate()
    trainer.save_state()
    assert json.loads((tmp_path / "trainer_state.json").read_text())["best_metric"] is None


def test_checkpoints_that_do_not_wait_for_all_ranks_are_not_silent(tmp_path, monkeypatch, caplog):
    """As if a release of transformers had renamed its private method."""
    monkeypatch.delattr(SparseTrainerMixin, "_save_rng_state")
    ranks = SimpleNamespace(world_size=2)
    monkeypatch.setattr("hf_sparse.training.trainer.get_communicator", lambda: ranks)
    options = {"target_sparsity": 0.5, "save_strategy": "steps", "save_steps": 5, **SCHEDULE}
    make(tmp_path, save_only_model=True, **options).train()
    assert "_save_rng_state" not in caplog.text
    make(tmp_path, **options).train()
    assert "does not call _save_rng_state" in caplog.text
