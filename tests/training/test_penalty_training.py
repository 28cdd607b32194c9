"""Penalties in training: the gradients that the optimizer sees, the log, resuming, cards, and what is refused."""

import json
import shutil

import pytest
import torch
from helpers.tiny import SCHEDULE, STEPS, arguments, bert, content, make, same, samples, weights
from transformers import HfArgumentParser, Trainer, TrainerCallback

from hf_sparse import (
    PruningConfig,
    PruningConfigError,
    SparseTrainer,
    SparseTrainingArguments,
    SparsityCallback,
    register_penalty,
)
from hf_sparse.files import CARD_FILE
from hf_sparse.penalties import Penalty
from hf_sparse.penalties.group_lasso import GroupLasso
from hf_sparse.penalties.l1 import L1


PENALIZED = {"target_sparsity": 0.5, "criterion": "magnitude", **SCHEDULE}


def with_scaler(cls, scale=1024.0):
    class Scaled(cls):
        """Trains with a gradient scaler, as on GPUs with fp16."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"

    return Scaled


class ByHand(TrainerCallback):
    """Adds the gradient of an L1 penalty, 0.01 up to the last prune step, to the final gradients of linear layers."""

    def __init__(self, names):
        self.names = names

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if name in self.names and state.global_step + 1 <= SCHEDULE["prune_end"]:
                parameter.grad += 0.01 * parameter.detach().sign()


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_optimizer_sees_the_gradient_of_loss_and_penalty(tmp_path, options, scaled):
    """Whatever the scale of the loss, the accumulation and the clipping."""
    cls = with_scaler(SparseTrainer) if scaled else SparseTrainer
    trainer = make(tmp_path, cls, penalty=L1(strength=0.01), **PENALIZED, **options)
    trainer.train()
    names = list(trainer.sparsity_callback.pruner.parameters)
    by_hand = make(tmp_path, cls, callbacks=[ByHand(names)], **PENALIZED, **options)
    by_hand.train()
    plain = make(tmp_path, cls, **PENALIZED, **options)
    plain.train()
    assert same(weights(trainer.model), weights(by_hand.model))
    assert not same(weights(trainer.model), weights(plain.model))


def test_the_scale_of_the_loss_changes_nothing(tmp_path):
    """But roundings of fp16. Were gradients not unscaled yet, the penalty would be lost beside them."""
    options = PENALIZED | {
        "optim": "sgd",
        "learning_rate": 0.1,
        "prune_start": STEPS,
        "prune_end": STEPS,
        "prune_every": None,
    }
    found = {}
    for name, scale, strength in (("one", 1.0, 0.05), ("large", 4096.0, 0.05), ("none", 1.0, 1e-9)):
        trainer = make(tmp_path, with_scaler(SparseTrainer, scale), penalty=L1(strength=strength), **options)
        trainer.train()
        found[name] = torch.cat([weight.flatten() for weight in weights(trainer.model).values()])
    assert (found["one"] - found["large"]).norm() < 0.02 * (found["one"] - found["none"]).norm()


def test_a_stock_trainer_with_the_callback_does_the_same(tmp_path):
    config = PruningConfig(penalty="l1", penalty_kwargs={"strength": 0.01}, **PENALIZED)
    stock = Trainer(bert(), arguments(tmp_path), train_dataset=samples(), callbacks=[SparsityCallback(config)])
    stock.train()
    trainer = make(tmp_path, penalty=L1(strength=0.01), **PENALIZED)
    trainer.train()
    assert same(weights(stock.model), weights(trainer.model))
    logs = [log for log in stock.state.log_history if "penalty_l1" in log]
    assert [log["penalty_l1"] for log in logs] == [
        log["penalty_l1"] for log in trainer.state.log_history if "penalty_l1" in log
    ]


def test_criteria_see_the_gradients_of_the_loss_alone(tmp_path):
    """With learning rate 0 nothing but the statistic could change the masks."""
    masks = []
    for penalty in (None, GroupLasso(strength=10.0)):
        options = PENALIZED | {"criterion": "snip", "learning_rate": 0.0, "pattern": "4x1"}
        trainer = make(tmp_path, penalty=penalty, **options)
        trainer.train()
        masks.append({name: weight != 0 for name, weight in weights(trainer.model).items()})
    assert same(*masks)


@pytest.mark.parametrize("pattern", ["4x1", "head"])
def test_the_term_of_the_loss_is_logged(tmp_path, pattern):
    values = []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            values.append(callback.penalties.groups[0].value())

    penalty = GroupLasso(strength=0.5, warmup=4)
    trainer = make(tmp_path, callbacks=[Seen()], penalty=penalty, pattern=pattern, **PENALIZED)
    callback = trainer.sparsity_callback
    trainer.train()
    logged = [log["penalty_group_lasso"] for log in trainer.state.log_history if "loss" in log]
    strengths = [penalty.strength_at(step, STEPS, SCHEDULE["prune_end"]) for step in range(1, STEPS + 1)]
    assert strengths[:5] == [0.125, 0.25, 0.375, 0.5, 0.5] and strengths[-1] == 0
    assert logged == [pytest.approx(strength * value) for strength, value in zip(strengths, values, strict=True)]
    assert all(values)


def test_group_lasso_concentrates_the_weights_in_fewer_units(tmp_path):
    """The blocks that are pruned have a smaller share of the weights' magnitude than without it."""

    def share(penalty):
        trainer = make(
            tmp_path, penalty=penalty, pattern="4x1", target_sparsity=0.5, criterion="magnitude", scope="layer",
            prune_start=40, prune_end=40, max_steps=40, learning_rate=2e-3, logging_steps=50,
        )  # fmt: skip
        norms = []
        prune = trainer.sparsity_callback.on_optimizer_step

        def before(args, state, control, **kwargs):
            if state.global_step == 39:
                weight = trainer.model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight")
                norms.extend(weight.detach().view(10, 4, -1).norm(dim=1).flatten().sort().values.split(120))
            prune(args, state, control, **kwargs)

        trainer.sparsity_callback.on_optimizer_step = before
        trainer.train()
        low, high = norms
        return float(low.sum() / (low.sum() + high.sum()))

    assert share(GroupLasso(strength=0.05)) < 0.8 * share(None)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    options = PENALIZED | {"penalty": "group_lasso", "pattern": "4x1", "save_strategy": "steps", "save_steps": 2}
    options["penalty_kwargs"] = {"strength": 0.01, "warmup": 0.5, "until_prune_end": False}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = make(tmp_path / "resumed", model=bert(seed=5), **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))
    assert content(tmp_path / "whole" / "checkpoint-8") == content(tmp_path / "resumed" / "checkpoint-8")
    other = make(tmp_path / "resumed", model=bert(seed=5), **options | {"penalty_kwargs": {"strength": 0.02}})
    with pytest.raises(ValueError, match="`penalty_kwargs`: "):
        other.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"))


def test_groups_have_penalties_of_their_own_and_cards_name_them(tmp_path):
    groups = {
        "attention": {"targets": ["*attention*"], "penalty": "group_lasso", "pattern": "4x1"},
        "ffn": {"targets": ["*layer.0.intermediate*", "*layer.0.output*"]},
        "pooler": {"targets": ["*pooler*"], "penalty": None},
    }
    options = PENALIZED | {"groups": groups, "penalty": "l1", "penalty_kwargs": {"strength": 0.01}}
    trainer = make(tmp_path, **options)
    trainer.train()
    found = {group.options.name: group.penalty for group in trainer.sparsity_callback.penalties.groups}
    assert found == {"attention": GroupLasso(), "ffn": L1(strength=0.01)}
    assert {"penalty_l1", "penalty_group_lasso"} <= trainer.state.log_history[0].keys()
    trainer.save_model()
    trainer.create_model_card()
    settings = json.loads((tmp_path / CARD_FILE).read_text())["settings"]
    assert [group.get("penalty") for group in settings] == ["group_lasso", "l1", None]
    assert "l1 (strength=0.01)" in (tmp_path / "README.md").read_text()


def test_a_registered_penalty_works_by_name(tmp_path):
    from dataclasses import dataclass

    @register_penalty("half_norm")
    @dataclass(frozen=True)
    class HalfNorm(Penalty):
        def value(self, norms, size):
            return norms.sqrt()

        def slope(self, norms, size):
            return 0.5 / norms.sqrt()

    options = ["--penalty", "half_norm", "--penalty_kwargs", '{"strength": 0.01}', "--target_sparsity", "0.5"]
    (args,) = HfArgumentParser(SparseTrainingArguments).parse_args_into_dataclasses(["--output_dir", "o", *options])
    assert args.resolve_groups()["weights"].penalty == HalfNorm(strength=0.01)
    trainer = make(tmp_path, penalty="half_norm", pattern="channel", **PENALIZED)
    trainer.train()
    assert trainer.state.log_history[0]["penalty_half_norm"] > 0


@pytest.mark.parametrize(
    "options, text",
    [
        ({"penalty": "l1"}, '`penalty` is "l1", but nothing is pruned: give `target_sparsity`'),
        ({"penalty": "l1", "keep_zeros": True}, '`penalty` is "l1", but nothing is pruned'),
        ({"penalty": "l3", "target_sparsity": 0.5}, '`penalty` is "l3": known are group_lasso, l1'),
        ({"penalty_kwargs": {"strength": 1.0}, "target_sparsity": 0.5}, "but no penalty is used: name one"),
        ({"penalty": "l1", "penalty_kwargs": {"strength": 0}, "target_sparsity": 0.5}, '"strength" is 0: it must be'),
    ],
)
def test_what_is_refused(options, text):
    with pytest.raises(PruningConfigError, match=text):
        PruningConfig(**options)


def test_frozen_weights_are_refused(tmp_path):
    model = bert()
    model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").requires_grad_(False)
    with pytest.raises(
        PruningConfigError, match='`penalty` "l1" draws .*"bert.encoder.layer.0.*query.weight" is frozen'
    ):
        make(tmp_path, model=model, penalty="l1", **PENALIZED)
