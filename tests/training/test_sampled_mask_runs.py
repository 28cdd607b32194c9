"""Sampled masks in training: against the same model written with torch's parametrizations, in float64; priors, the
final masks, resuming, and errors."""

import itertools
import json

import pytest
import torch
from helpers.tiny import bert, gpt2, make, same, weights
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback

from hf_sparse import Pruner, PruningConfig
from hf_sparse.distributed import build_shards
from hf_sparse.model.layers import find_layers
from hf_sparse.training.learned_masks.parts import WeightParts, noise_key


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# The last prune step is step 8 of 10, and weights train afterwards.
TIMES = {"prune_start": 2, "prune_end": 8, "prune_every": 2}
PLAIN = {"weight_decay": 0.0, "max_grad_norm": 0.0, "optim": "adamw_torch"}
RUNS = {
    "gumbel_nm": {"pattern": "2:4"},
    "gumbel_sigmoid": {"target_sparsity": 0.75, "scope": "global"},
}


def options_of(algorithm, **kwargs):
    kwargs = {"learning_rate": 0.1, "norm_weight": 0.01, **kwargs}
    return {"algorithm": algorithm, "algorithm_kwargs": kwargs, **RUNS[algorithm], **TIMES, **PLAIN}


class Sampled(nn.Module):
    """W -> W times a relaxed sample, differentiated by autograd. Losses of the masks are in `added`."""

    def __init__(self, clock, part, theta, seed):
        super().__init__()
        self.clock, self.part, self.seed = clock, part, seed
        self.theta = nn.Parameter(theta)

    def uniform(self, index):
        key = noise_key(self.seed, self.clock.step, index)
        return self.part.join([self.part.noise(0, key)]).double()

    def annealed(self):
        share = min(1.0, max(0.0, (self.clock.step - 2) / 6))
        return 1 + share * 4, 4 + share * (0.05 - 4)

    def forward(self, weight):
        by_column = self.part.layer.row_dim > self.part.layer.column_dim
        kappa, tau = self.annealed()
        mask = self.mask(kappa, tau, weight.T if by_column else weight, by_column)
        product = weight * (mask.T if by_column else mask)
        self.added = -0.01 * product.square().sum()
        return product


class SampledNM(Sampled):
    """theta: (rows, groups, masks)."""

    def mask(self, kappa, tau, weight, by_column):
        groups = weight.shape[0], weight.shape[1] // 4, 4
        uniform = [self.uniform(index).T if by_column else self.uniform(index) for index in range(2)]
        uniform = torch.cat([each.reshape(groups) for each in uniform], dim=-1)[..., :6]
        shares = torch.softmax((kappa * self.theta - torch.log(-torch.log(uniform))) / tau, dim=-1)
        kept = list(itertools.combinations(range(4), 2))
        columns = [sum(shares[..., k] for k in range(6) if column in kept[k]) for column in range(4)]
        return torch.stack(columns, dim=-1).reshape(weight.shape)


class SampledSigmoid(Sampled):
    """theta: of the weight's shape, transposed where rows are columns."""

    def mask(self, kappa, tau, weight, by_column):
        uniform = self.uniform(0).T if by_column else self.uniform(0)
        self.probabilities = torch.sigmoid(kappa * self.theta)
        return torch.sigmoid((kappa * self.theta + torch.log(uniform / (1 - uniform))) / tau)


class Clock(TrainerCallback):
    """The step whose forward pass computes next, and the weights of the selected layers with which it does."""

    def __init__(self, names):
        self.step, self.names, self.seen = 1, names, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step + 1
        with torch.no_grad():
            modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.names}
            self.seen.append({name: module.weight.detach().clone() for name, module in modules.items()})


class ReferenceTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        samples = [module for module in model.modules() if isinstance(module, Sampled)]
        loss = loss + sum(sample.added for sample in samples)
        if isinstance(samples[0], SampledSigmoid):
            kept = torch.cat([sample.probabilities.flatten() for sample in samples])
            loss = loss + 0.1 * len(kept) * (kept.mean() - 0.25) ** 2
        return loss


def magnitude_masks(model, algorithm):
    config = PruningConfig(criterion="magnitude", **{"scope": "layer", **RUNS[algorithm]})
    pruner = Pruner(model, config)
    pruner.update(1, 1)
    return dict(pruner.masks.items())


def reference(model, algorithm, seed, clock):
    """The model with the parametrization on each selected weight; everything else is frozen."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    masks, layers = magnitude_masks(model, algorithm), [layer for layer in find_layers(model) if layer.in_blocks]
    shards, _ = build_shards(dict(model.named_parameters()))
    parts = {layer: WeightParts(layer, shards[layer.name]) for layer in layers}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(before[name])
            value.requires_grad_(False)
    for layer in layers:
        mask = masks[layer.name].double()
        mask = mask.T if layer.row_dim > layer.column_dim else mask
        if algorithm == "gumbel_nm":
            kept = list(itertools.combinations(range(4), 2))
            groups = mask.reshape(mask.shape[0], -1, 4)
            overlaps = [groups[..., first] + groups[..., second] for first, second in kept]
            sample = SampledNM(clock, parts[layer], 3.0 * (torch.stack(overlaps, dim=-1) - 1), seed)
        else:
            sample = SampledSigmoid(clock, parts[layer], 3.0 * (2 * mask - 1), seed)
        parametrize.register_parametrization(model.get_submodule(layer.module), "weight", sample)
    return model


@pytest.mark.parametrize("make_model", [lambda: bert(**NO_DROPOUT), gpt2], ids=["bert", "gpt2"])
@pytest.mark.parametrize("algorithm", RUNS)
def test_training_is_that_of_the_parametrized_model(tmp_path, algorithm, make_model):
    ours = make(tmp_path / "ours", model=make_model().double().eval(), **options_of(algorithm))
    names = [layer.name for layer in find_layers(ours.model) if layer.in_blocks]
    clock = Clock(names)
    ours.add_callback(clock)
    ours.train()

    other = Clock(names)
    model = reference(make_model().double().eval(), algorithm, ours.args.seed, other)
    # The learning rate of theta is 0.1, times the factor of the trainer's schedule.
    plain = {**PLAIN, "learning_rate": 0.1}
    make(tmp_path / "reference", ReferenceTrainer, model, callbacks=[other], **plain).train()
    for step in range(7):  # the eighth selects the masks
        for name in names:
            torch.testing.assert_close(
                clock.seen[step][name], other.seen[step][name], rtol=1e-6, atol=1e-9, msg=f"step {step + 1}, {name}"
            )


class Final(TrainerCallback):
    """The parameters at the start and after each step, and the zeros of the selected weights."""

    def __init__(self, model):
        self.start, self.steps = weights(model), {}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps[state.global_step + 1] = weights(model)


@pytest.mark.parametrize("algorithm", RUNS)
def test_nothing_trains_but_the_mask_until_it_is_final(tmp_path, algorithm):
    trainer = make(tmp_path, **options_of(algorithm), eval_strategy="steps", eval_steps=2)
    record = Final(trainer.model)
    trainer.add_callback(record)
    trainer.train()
    masks = dict(trainer.sparsity_callback.pruner.masks.items())
    others = record.start.keys() - masks.keys()
    for step in range(1, 9):
        assert all(torch.equal(record.steps[step][name], record.start[name]) for name in others)
    final, target = record.steps[8], RUNS[algorithm].get("target_sparsity", 0.5)
    for name, mask in masks.items():
        assert torch.equal(final[name], record.start[name].masked_fill(~mask, 0.0)), name
        assert bool(record.steps[2][name].all())  # samples are soft, and hard at the end
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(target * 4224)
    if algorithm == "gumbel_nm":
        assert all(bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in masks.values())
    # Afterwards the weights that are kept train as usual.
    assert all(not torch.equal(record.steps[10][name][mask], final[name][mask]) for name, mask in masks.items())
    assert all(not record.steps[10][name][~mask].any() for name, mask in masks.items())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    key = "mask_density" if algorithm == "gumbel_sigmoid" else "mask_confidence"
    assert [key in log for log in logs] == [True] * 7 + [False] * 3
    assert all(0 < log[key] <= 1 for log in logs[:7])


def pruned_checkpoint(folder, seed=3, **options):
    """Another model of the same shapes, pruned; its values differ from those of the model that is trained."""
    model = bert(seed)
    pruner = Pruner(model, PruningConfig(criterion="magnitude", scope="layer", **options))
    pruner.update(1, 1)
    model.save_pretrained(folder)
    return dict(pruner.masks.items())


def test_the_mask_starts_at_the_zeros_of_the_prior(tmp_path):
    expected = pruned_checkpoint(tmp_path / "prior", pattern="2:4")
    options = options_of("gumbel_nm", prior=str(tmp_path / "prior"), learning_rate=1e-9)
    trainer = make(tmp_path / "out", **options)
    trainer.train()
    assert same(dict(trainer.sparsity_callback.pruner.masks.items()), expected)
    config = json.loads((tmp_path / "out" / "pruning_config.json").read_text())
    assert config["algorithm_kwargs"]["prior"] == "prior"  # without the folders of this machine


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: bert(3).save_pretrained(folder), "have no zeros there"),
        (lambda folder: None, "does not exist"),
        (lambda folder: bert(3, intermediate_size=44).save_pretrained(folder), "but 40x24 in the model"),
        (lambda folder: gpt2().save_pretrained(folder), "has no weight"),
    ],
)
def test_a_prior_of_another_kind_is_refused_before_training(tmp_path, damage, words):
    damage(tmp_path / "prior")
    trainer = make(tmp_path / "out", **options_of("gumbel_nm", prior=str(tmp_path / "prior")))
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert same(weights(trainer.model), before)


@pytest.mark.parametrize("algorithm", RUNS)
@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, algorithm, step):
    options = options_of(algorithm) | {"save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    again = make(tmp_path / "again", model=bert(7), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert same(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("options", [options_of("gumbel_sigmoid"), {"algorithm": "movement", "target_sparsity": 0.5}])
def test_weights_that_the_loss_does_not_reach_are_named(tmp_path, caplog, options):
    model = bert(num_hidden_layers=2)
    model.bert.encoder.layer[0].forward = lambda states, *args, **kwargs: states
    make(tmp_path, model=model, **options).train()
    assert (
        f'depend on 6 selected weights, so `algorithm` "{options["algorithm"]}" learns no mask of them: '
        in caplog.text
    )
    caplog.clear()
    make(tmp_path, model=bert(num_hidden_layers=2), **options).train()
    assert "learns no mask" not in caplog.text
