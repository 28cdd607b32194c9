"""Pruned weights are +0.0 and exactly as many as asked for, whatever optimizer, precision or trainer feature is on.

A spy, called after our own callback, looks at the weights at every event; every file that was written is read too.
The expected numbers come from the formula of the cubic curve, not from the package.
"""

import inspect
import json

import pytest
import torch
from helpers.invariants import TARGET, Spy, cubic, exactly_positive_zero
from helpers.masks import read_masks
from helpers.tiny import PRUNE_STEPS, SCHEDULE, STEPS, bert, gpt2, make, same, weights, zeros
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sparse import PruningConfig, SparseTrainer, SparsityCallback


def spied(tmp_path, unit=1, target=TARGET, **options):
    """A SparseTrainer on the usual schedule, and the spy on it."""
    trainer = make(tmp_path, **{"target_sparsity": target, **SCHEDULE, **options})
    spy = Spy(trainer.sparsity_callback, unit, target, returns="algorithm" in options)
    trainer.add_callback(spy)
    return trainer, spy


def check_files(tmp_path, keys) -> int:
    """Every checkpoint: state-dict keys as ever, pruned weights +0.0 under the masks beside them."""
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        saved = load_file(checkpoint / "model.safetensors")
        assert saved.keys() == keys
        for name, mask in read_masks(checkpoint):
            assert exactly_positive_zero(saved[name], mask), (checkpoint, name)
    return len(checkpoints)


OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch"},
    "adamw_fused": {"optim": "adamw_torch_fused"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("criterion", ["magnitude", "snip_momentum"])
def test_zeros_hold_under_every_optimizer_and_in_every_file(tmp_path, optimizer, criterion):
    trainer, spy = spied(
        tmp_path,
        criterion=criterion,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=1,
        **OPTIMIZERS[optimizer],
    )
    keys = weights(trainer.model).keys()
    trainer.train()

    assert spy.events == {"begin", "optimizer_step", "step_end", "evaluate", "save", "end"}
    assert list(spy.pruned_at.values()).count(0) == 2
    assert check_files(tmp_path, keys) == STEPS
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert same(weights(plain), weights(trainer.model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_callback_the_zeros_would_come_back(tmp_path, name):
    """The test above is able to fail: every one of these optimizers moves zeroed weights."""
    model = bert()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    weight.data[:, ::2] = 0
    make(tmp_path, Trainer, model, max_steps=1, **OPTIMIZERS[name]).train()
    assert weight[:, ::2].any()


FEATURES = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "no_clipping": {"max_grad_norm": 0.0},
    "greedy_movement": {"criterion": "greedy_movement"},
    "movement": {"algorithm": "movement", "criterion": None, "bf16": True, "gradient_accumulation_steps": 2},
    "soft_movement": {"algorithm": "soft_movement", "criterion": None},
    "taylor_global": {"criterion": "taylor", "scope": "global"},
    "granet": {"criterion": "snip_momentum", "algorithm": "granet"},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.5, "per_device_train_batch_size": 6},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_zeros_hold_under_every_feature(tmp_path, feature):
    if feature == "compiled" and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 cannot compile the BERT of transformers 5.6, with or without pruning")
    options = {"criterion": "snip_momentum", "save_strategy": "steps", "save_steps": 4} | FEATURES[feature]
    trainer, spy = spied(tmp_path, **options)
    keys = weights(trainer.model).keys()
    trainer.train()
    assert len(spy.pruned_at) == STEPS
    assert check_files(tmp_path, keys) >= 2


def test_zeros_hold_with_activation_checkpointing(tmp_path):
    new = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    trainer, spy = spied(tmp_path, criterion="snip_momentum", **{name: True})
    trainer.train()
    other, _ = spied(tmp_path, criterion="snip_momentum")
    other.train()
    assert getattr(trainer.model, f"is_{name}")
    assert trainer.sparsity_callback.pruner.masks.digest() == other.sparsity_callback.pruner.masks.digest()


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "4x1"}, {"pattern": "1x4", "scope": "global"}])
@pytest.mark.parametrize("model", [bert, gpt2])
def test_zeros_hold_in_patterns(tmp_path, model, options):
    trainer, _ = spied(tmp_path, unit=1 if options["pattern"] == "2:4" else 4, model=model(), **options)
    trainer.train()
    for name, mask in trainer.sparsity_callback.pruner.masks.items():
        matrix = mask.t() if model is gpt2 else mask  # outputs x inputs
        if options["pattern"] == "4x1":
            blocks = matrix.reshape(matrix.shape[0] // 4, 4, -1).sum(dim=1)
            assert set(blocks.unique().tolist()) <= {0, 4}, name
        else:
            groups = matrix.reshape(-1, 4).sum(dim=1)
            assert set(groups.unique().tolist()) <= ({2} if options["pattern"] == "2:4" else {0, 4}), name


class Float16Trainer(SparseTrainer):
    """Trains on the CPU with the gradient scaler of fp16, whose gradients overflow at the steps `overflows`."""

    overflows: tuple[int, ...] = ()

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step + 1 in self.overflows:
            self.model.bert.encoder.layer[0].attention.self.query.weight.grad[0, 0] = torch.inf
        return loss


class Overflow(TrainerCallback):
    """The sums of the criterion do not change at a step that overflows, and the weights only by pruning."""

    def __init__(self, trainer):
        self.trainer, self.refused, self.skipped = trainer, [], []

    def _sums(self):
        stats = self.trainer.sparsity_callback.pruner.groups[0].statistics
        return {name: stat.total.clone() for name, stat in stats.items()}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.sums, self.weights = self._sums(), weights(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert all(torch.isfinite(total).all() for total in self._sums().values())
        if same(self._sums(), self.sums):
            self.refused.append(state.global_step + 1)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        pruner, now = self.trainer.sparsity_callback.pruner, weights(model)
        pruner.masks.enforce(self.weights)
        expected = {name: self.weights[name] for name in pruner.masks}
        if same({name: now[name] for name in pruner.masks}, expected):
            self.skipped.append(state.global_step + 1)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("overflows", [(2, 5), (1, 2, 3)], ids=["some", "all_before_the_first_prune_step"])
def test_overflowing_gradients_never_enter_a_score(tmp_path, monkeypatch, optim, overflows):
    monkeypatch.setattr(Float16Trainer, "overflows", overflows)
    trainer, spy = spied(tmp_path, trainer=Float16Trainer, criterion="snip_momentum", optim=optim)
    spy.allowed_late = {3} if overflows == (1, 2, 3) else set()
    seen = Overflow(trainer)
    trainer.add_callback(seen)
    trainer.train()
    assert tuple(seen.refused) == (*overflows, 9, 10)  # nothing is observed after the last prune step
    assert tuple(seen.skipped) == overflows
    assert spy.pruned_at[3] == (0 if spy.allowed_late else round(cubic(1, 4, TARGET) * spy.weights))
    assert trainer.sparsity_callback.pruner.refused_observations == len(overflows)


class OutOfMemory(SparseTrainer):
    """The batch that it starts with does not fit, as it turns out after the first prune step."""

    failed = False

    def training_step(self, *args, **kwargs):
        if self.state.global_step == PRUNE_STEPS[0] and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory. Tried to allocate everything.")
        return super().training_step(*args, **kwargs)


def test_zeros_hold_when_the_batch_size_did_not_fit(tmp_path):
    trainer, spy = spied(tmp_path, trainer=OutOfMemory, auto_find_batch_size=True, criterion="snip_momentum")
    trainer.train()
    assert trainer.failed and trainer._train_batch_size < 4
    assert spy.start == round(cubic(1, 4, TARGET) * spy.weights)  # those of the first attempt


def test_a_second_train_keeps_the_zeros(tmp_path):
    trainer, spy = spied(tmp_path)
    trainer.train()
    masks = trainer.sparsity_callback.pruner.masks
    trainer.train()
    assert spy.start == 2112
    assert all(torch.equal(masks[name], trainer.sparsity_callback.pruner.masks[name]) for name in masks)


def test_masks_start_fresh_when_model_init_makes_a_new_model(tmp_path):
    seeds = iter(range(10))
    options = {"model_init": lambda: bert(next(seeds))}
    trainer, spy = spied(tmp_path, model=None, trainer_options=options)
    trainer.train()
    first = trainer.sparsity_callback.pruner.masks.digest()
    trainer.train()
    assert spy.start == 0
    assert trainer.sparsity_callback.pruner.masks.digest() != first


def test_evaluation_outside_training_changes_nothing(tmp_path):
    trainer, _ = spied(tmp_path)
    before = weights(trainer.model)
    trainer.evaluate()
    assert same(before, weights(trainer.model))
    trainer.train()
    after, digest = weights(trainer.model), trainer.sparsity_callback.pruner.masks.digest()
    trainer.evaluate()
    assert same(after, weights(trainer.model))
    assert trainer.sparsity_callback.pruner.masks.digest() == digest


# The best checkpoint


class FallingMetric:
    """Every evaluation is worse than the one before, so that the first checkpoint would be the best of all."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prediction):
        self.calls += 1
        return {"score": 1.0 / self.calls, "penalty": float(self.calls)}


def best_options(strategy: str, metric: str) -> dict:
    return {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": strategy,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": metric == "score",
    }


def strict_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_every_checkpoint_can_be_the_best_where_only_zeros_are_kept(tmp_path):
    options = {"trainer_options": {"compute_metrics": FallingMetric()}, **best_options("steps", "score")}
    trainer = make(tmp_path, keep_zeros=True, max_steps=3, **options)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_model_checkpoint) == (1.0, str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("kind", ["sparse", "stock"])
@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.parametrize("metric", ["score", "penalty"])
def test_only_checkpoints_at_the_final_sparsity_can_be_the_best(tmp_path, kind, strategy, metric):
    options = {"trainer_options": {"compute_metrics": FallingMetric()}, **best_options(strategy, metric)}
    if kind == "sparse":
        trainer = make(tmp_path, target_sparsity=TARGET, scope="layer", **SCHEDULE, **options)
    else:
        callback = SparsityCallback(PruningConfig(target_sparsity=TARGET, scope="layer", **SCHEDULE))
        trainer = make(tmp_path, Trainer, callbacks=[callback], **options)
    trainer.train()
    trainer.save_state()

    best = tmp_path / f"checkpoint-{PRUNE_STEPS[-1]}"  # the earliest at the final sparsity, so the best of those
    assert trainer.state.best_model_checkpoint == str(best)
    assert trainer.state.best_metric == (1 / 8 if metric == "score" else 8.0)
    assert same(weights(trainer.model), load_file(best / "model.safetensors"))
    assert zeros(trainer.model) == 2112
    checkpoints = list(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == (1 if strategy == "best" else STEPS)
    for folder in checkpoints:
        state = strict_json(folder / "trainer_state.json")
        if kind == "sparse" or state["global_step"] >= PRUNE_STEPS[-1]:
            assert state["best_metric"] is None or abs(state["best_metric"]) < 100
    assert strict_json(tmp_path / "trainer_state.json")["best_metric"] == trainer.state.best_metric


def test_learned_masks_leave_out_steps_that_overflow(tmp_path, monkeypatch):
    """The second of which has a prune step."""
    monkeypatch.setattr(Float16Trainer, "overflows", (2, 5))
    trainer, spy = spied(tmp_path, trainer=Float16Trainer, algorithm="movement", save_strategy="steps", save_steps=7)
    updates = []

    class Updates(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            updates.append(trainer.sparsity_callback.run.trained.updates)

    trainer.add_callback(Updates())
    trainer.train()
    assert updates == [1, 1, 2, 3, 3, 4, 5, 0, 0, 0]  # dropped at the last prune step
    assert spy.pruned_at[STEPS] == round(TARGET * spy.weights) and all(
        torch.isfinite(weight).all() for weight in weights(trainer.model).values()
    )
