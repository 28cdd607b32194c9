"""Dynamic sparse training in whole runs: sparsity at every step, returned weights, their optimizer state, logs."""

from dataclasses import dataclass

import pytest
import torch
from helpers.invariants import exactly_positive_zero
from helpers.tiny import PRUNE_STEPS, SCHEDULE, STEPS, bert, content, make, weights
from transformers import TrainerCallback

from hf_sparse import register_algorithm
from hf_sparse.algorithms import DynamicSparsity
from hf_sparse.algorithms.growth import RandomGrowth


MOMENTS = {"sgd": ("momentum_buffer",)}


class Watch(TrainerCallback):
    """Checks masks and weights after each optimizer step, and the optimizer's state of weights that have returned."""

    def __init__(self, callback, optim):
        self.callback, self.optim = callback, optim
        self.sparsities, self.returned, self.best = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.kept = dict(self.callback.pruner.masks)
        self.sparsities.append(self.callback.pruner.masked_sparsity())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        pruner, parameters, count = self.callback.pruner, dict(model.named_parameters()), 0
        for name, mask in pruner.masks.items():
            returned = mask & ~self.kept[name]
            assert exactly_positive_zero(parameters[name], mask & ~returned), name
            moments = optimizer.state[parameters[name]]
            for key in MOMENTS.get(self.optim, ("exp_avg", "exp_avg_sq")):
                assert not moments[key][returned].any() and moments[key][mask & ~returned].any(), (name, key)
            self.kept[name], count = mask, count + int(returned.sum())
        self.returned.append(count)
        self.sparsities.append(round(pruner.masked_sparsity(), 4))

    def on_step_end(self, args, state, control, **kwargs):
        self.best.append(self.callback._is_at_final_sparsity(state))


def train(folder, model=None, resume_from=None, **options):
    options = {"target_sparsity": 0.5, "save_strategy": "steps", "save_steps": 4, **SCHEDULE, **options}
    trainer = make(folder, model=model, **options)
    watch = Watch(trainer.sparsity_callback, trainer.args.optim)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, watch


def at_prune_steps(values):
    return [values[step - 1] for step in PRUNE_STEPS]


OPTIONS = {
    "rigl": {"algorithm": "rigl"},
    "rigl_n_of_m": {"algorithm": "rigl", "pattern": "2:4"},
    "rigl_rows": {"algorithm": "rigl", "scope": "row"},
    "set_random_blocks": {"algorithm": "set", "algorithm_kwargs": {"initial_mask": "random"}, "pattern": "4x1"},
    "rigl_sgd": {"algorithm": "rigl", "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "rigl_fused": {"algorithm": "rigl", "optim": "adamw_torch_fused"},
    "set_erdos_renyi": {"algorithm": "set", "allocation": "erdos_renyi"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_at_the_target_from_the_start(tmp_path, name):
    trainer, watch = train(tmp_path, **OPTIONS[name])
    assert watch.sparsities == [0.5] * (STEPS + 1)
    exchanged = at_prune_steps(watch.returned)
    assert all(exchanged[:3]) and exchanged[0] > exchanged[2] and not exchanged[3]
    assert sum(watch.returned) == sum(exchanged)
    assert all(watch.best)  # every checkpoint can be the best
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {log["target_sparsity"] for log in logs} == {0.5} and logs[-1]["sparsity"] == 0.5
    # A weight that has just returned is still zero, as one that never has a gradient remains.
    assert all(log["sparsity"] >= round(0.5 + watch.returned[log["step"] - 1] / 4224, 6) for log in logs)


def test_gradual_pruning_with_regrowth_meets_the_schedule(tmp_path):
    trainer, watch = train(tmp_path, algorithm="granet", sparsity_decay_type="linear")
    assert at_prune_steps(watch.sparsities[1:]) == [0.125, 0.25, 0.375, 0.5]
    # What the first prune step has pruned itself was not pruned before.
    assert [count > 0 for count in at_prune_steps(watch.returned)] == [False, True, True, False]
    assert watch.best == [step >= 8 for step in range(1, STEPS + 1)]


def test_dense_and_compressed_phases(tmp_path):
    """Four prune steps begin four phases: dense, compressed, dense, compressed."""
    trainer, watch = train(tmp_path, algorithm="acdc", pattern="4x1")
    assert watch.sparsities[1:] == [0, 0, 0, 0, 0.5, 0.5, 0, 0.5, 0.5, 0.5]
    assert at_prune_steps(watch.returned) == [0, 0, 2112, 0]
    logs = {log["step"]: log["target_sparsity"] for log in trainer.state.log_history if "target_sparsity" in log}
    assert [logs[step] for step in range(1, STEPS + 1)] == watch.sparsities[1:]
    assert watch.best == [step >= 8 for step in range(1, STEPS + 1)]


def test_a_dense_phase_comes_in_a_second_training_too(tmp_path):
    trainer, _ = train(tmp_path, algorithm="acdc")
    watch = Watch(trainer.sparsity_callback, trainer.args.optim)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.sparsities[0] == 0.5 and watch.sparsities[3] == 0 and watch.sparsities[-1] == 0.5


def test_weights_return_under_gradient_clipping_and_accumulation_as_without(tmp_path):
    """Accumulated batches, and a norm below that of the gradients: the largest gradients are the same."""
    options = {"algorithm": "rigl", "learning_rate": 0.0, "weight_decay": 0.0}
    plain, _ = train(tmp_path / "plain", max_grad_norm=0.0, **options)
    clipped, _ = train(tmp_path / "clipped", max_grad_norm=1e-3, **options)
    digests = {trainer.sparsity_callback.pruner.masks.digest() for trainer in (plain, clipped)}
    assert len(digests) == 1


@pytest.mark.parametrize("options", [{"algorithm": "rigl"}, {"algorithm": "granet", "pattern": "4x1"}])
def test_weights_return_by_the_gradients_of_the_loss_alone(tmp_path, options):
    """Gradients of a penalty would all be larger."""
    options = options | {"learning_rate": 0.0, "weight_decay": 0.0}
    plain, _ = train(tmp_path / "plain", **options)
    penalty = {"penalty": "group_lasso", "penalty_kwargs": {"strength": 10.0}}
    penalized, _ = train(tmp_path / "penalized", **penalty, **options)
    digests = {trainer.sparsity_callback.pruner.masks.digest() for trainer in (plain, penalized)}
    assert len(digests) == 1


@dataclass(frozen=True)
class Halves(DynamicSparsity):
    """Starts dense, prunes half of the target, and exchanges as many as the option says at each prune step."""

    fraction: float = 0.5

    exchanges = True
    follows_scheduler = False

    def sparsity(self, scheduled, target, prune_step, total):
        return target if prune_step == total else target / 2 * (prune_step > 0)

    def exchanged_fraction(self, prune_step, total):
        return self.fraction if prune_step < total else 0.0

    def growth(self, prune_step):
        return RandomGrowth(prune_step)


def test_a_registered_algorithm_goes_through_whole_runs(tmp_path):
    register_algorithm("halves")(Halves)
    options = {"algorithm": Halves(0.25), "scope": "layer"}
    trainer, watch = train(tmp_path / "whole", **options)
    assert at_prune_steps(watch.sparsities[1:]) == [0.25, 0.25, 0.25, 0.5]
    assert [count > 0 for count in at_prune_steps(watch.returned)] == [False, True, True, False]
    resumed, _ = train(tmp_path / "resumed", bert(seed=9), str(tmp_path / "whole" / "checkpoint-4"), **options)
    last = f"checkpoint-{STEPS}"
    assert content(tmp_path / "resumed" / last) == content(tmp_path / "whole" / last)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Pruning algorithm: halves (fraction=0.25)." in card and "Sparsity by the algorithm, 4 prune steps" in card
    assert all(torch.equal(mask, resumed.sparsity_callback.pruner.masks[name]) for name, mask in watch.kept.items())
    assert weights(trainer.model).keys() == weights(resumed.model).keys()
