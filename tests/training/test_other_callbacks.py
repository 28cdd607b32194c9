"""Callbacks of others beside ours: they change weights, and stop early."""

import logging

import pytest
import torch
from helpers.tiny import SCHEDULE, STEPS, make, weights, zeros
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_sparse import PruningConfig, SparseTrainer, SparseTrainerMixin, SparsityCallback


PRUNING = {"target_sparsity": 0.5, "scope": "layer", **SCHEDULE}


class Mixed(SparseTrainerMixin, Trainer):
    pass


# Weights that somebody else changes


class Averaging(TrainerCallback):
    """Averages weights over the steps, and puts the average into the model at one event, as EMA and SWA do."""

    def __init__(self, event: str, steps=range(1, STEPS + 1)):
        self.average, self.steps = {}, steps
        setattr(self, event, self.swap)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            before = self.average.setdefault(name, weight.detach().clone())
            before.lerp_(weight.detach(), 0.1)

    def swap(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(self.average[name])


def run_with(folder, kind, other, ours_first, **options):
    if kind is Trainer:
        callback = SparsityCallback(PruningConfig(**PRUNING))
        callbacks = [callback, other] if ours_first else [other, callback]
        return make(folder, Trainer, callbacks=callbacks, **options), callback
    trainer = make(folder, kind, callbacks=None if ours_first else [other], **PRUNING, **options)
    if ours_first:
        trainer.add_callback(other)
    return trainer, trainer.sparsity_callback


def zeros_in(folder, callback) -> bool:
    """Whether all pruned weights are zero in the file; masks do not change after prune_end."""
    saved = load_file(folder / "model.safetensors")
    return not any(saved[name][~mask].any() for name, mask in callback.pruner.masks.items())


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours, theirs", "theirs, ours"])
@pytest.mark.parametrize("event", ["on_optimizer_step", "on_step_end", "on_evaluate", "on_epoch_end"])
@pytest.mark.parametrize("kind", [SparseTrainer, Trainer])
def test_no_file_has_pruned_weights_that_another_callback_brought_back(tmp_path, caplog, kind, event, ours_first):
    options = {"eval_strategy": "epoch" if event == "on_epoch_end" else "steps", "eval_steps": 1}
    options |= {"save_strategy": options["eval_strategy"], "save_steps": 1, "max_steps": STEPS + 2}
    trainer, callback = run_with(tmp_path, kind, Averaging(event, {9, 10, 12}), ours_first, **options)
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        trainer.train()
    folders = [folder for folder in tmp_path.glob("checkpoint-*") if int(folder.name.split("-")[1]) >= 9]
    assert len(folders) == (1 if event == "on_epoch_end" else 4)
    assert all(zeros_in(folder, callback) for folder in folders)
    assert zeros(trainer.model) == 2112
    quiet = event == "on_optimizer_step" and not ours_first  # as an optimizer does it
    assert caplog.text.count("brought back") == (0 if quiet else 1)
    assert quiet or "2,112 pruned weights" in caplog.text


@pytest.mark.parametrize("kind", [SparseTrainer, Mixed])
def test_an_average_taken_at_the_end_has_the_zeros(tmp_path, caplog, kind):
    """After `on_train_end` of ours, in the model, in what is saved and in the report."""
    trainer, callback = run_with(tmp_path, kind, Averaging("on_train_end", {STEPS}), True)
    with caplog.at_level(logging.WARNING, "hf_sparse"):
        trainer.train()
    assert zeros(trainer.model) == 2112
    assert caplog.text.count("2,112 pruned weights") == 1
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.01)
    trainer.save_model(str(tmp_path / "model"))
    assert zeros_in(tmp_path / "model", callback)


def test_an_average_taken_before_ours_ends_training_in_a_stock_trainer(tmp_path, caplog):
    trainer, _ = run_with(tmp_path, Trainer, Averaging("on_train_end", {STEPS}), False)
    trainer.train()
    assert zeros(trainer.model) == 2112
    assert caplog.text.count("2,112 pruned weights") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_stock_trainer_leaves_no_hook_in_the_model(tmp_path, fails):
    class Failing(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if fails and state.global_step == STEPS:
                raise MemoryError

    options = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    trainer, callback = run_with(tmp_path, Trainer, Failing(), True, **options)
    if fails:
        with pytest.raises(MemoryError):
            trainer.train()
        fails = False
    trainer.train()
    for module in trainer.model.modules():
        assert not module._state_dict_pre_hooks


def test_evaluation_within_training_measures_the_pruned_model(tmp_path):
    """And not an average whose zeros are gone: `evaluate` returns what the saved model does."""
    trainer, _ = run_with(
        tmp_path, SparseTrainer, Averaging("on_step_end", {STEPS}), True, eval_strategy="steps", eval_steps=STEPS
    )
    trainer.train()
    logged = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == logged


def test_nothing_is_counted_or_written_where_nobody_changes_weights(tmp_path, caplog):
    trainer, callback = run_with(tmp_path, SparseTrainer, TrainerCallback(), True, save_strategy="steps", save_steps=2)
    trainer.train()
    before = weights(trainer.model)
    trainer.save_model(str(tmp_path / "model"))
    assert "brought back" not in caplog.text
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())


# Early stopping


class Falling:
    """Every evaluation is worse than the one before."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prediction):
        self.calls += 1
        return {"score": -float(self.calls)}


class Patience(EarlyStoppingCallback):
    """Somebody's own early stopping."""


@pytest.mark.parametrize("stopping", [EarlyStoppingCallback, Patience])
@pytest.mark.parametrize("strategy", ["no", "steps", "best"])
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours, theirs", "theirs, ours"])
def test_early_stopping_waits_for_the_final_sparsity_in_a_stock_trainer(tmp_path, ours_first, strategy, stopping):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": strategy, "save_steps": 1, "max_steps": 16}
    options |= {"load_best_model_at_end": strategy != "no", "metric_for_best_model": "score"}
    options |= {"greater_is_better": True}
    trainer, _ = run_with(
        tmp_path, Trainer, stopping(2), ours_first, trainer_options={"compute_metrics": Falling()}, **options
    )
    trainer.train()
    assert trainer.state.global_step == SCHEDULE["prune_end"] + 2
    assert trainer.state.best_metric == -SCHEDULE["prune_end"]
    if strategy != "no":
        assert trainer.state.best_global_step == SCHEDULE["prune_end"]
        assert zeros(trainer.model) == 2112


@pytest.mark.parametrize("metric", ["a_loss", "b_loss"])
def test_early_stopping_waits_where_several_sets_are_evaluated(tmp_path, metric):
    """Each set is an evaluation by itself, before Trainer compares the metric."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 16, "metric_for_best_model": metric}
    trainer, _ = run_with(tmp_path, SparseTrainer, EarlyStoppingCallback(2), True, learning_rate=0.0, **options)
    data = trainer.eval_dataset
    trainer.eval_dataset = {"a": data, "b": data[:4]}
    trainer.train()
    assert trainer.state.global_step >= SCHEDULE["prune_end"] + 2


def test_training_that_a_callback_stops_early_loads_no_early_best_checkpoint(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer, _ = run_with(tmp_path, Trainer, Stop(), True, trainer_options={"compute_metrics": Falling()}, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert zeros(trainer.model) == zeros_of_checkpoint(tmp_path / "checkpoint-6") > 0


def zeros_of_checkpoint(folder) -> int:
    saved = load_file(folder / "model.safetensors")
    return sum(int((tensor == 0).sum()) for name, tensor in saved.items() if tensor.ndim == 2 and "embed" not in name)
