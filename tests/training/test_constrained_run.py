"""Constrained training: against its equations in float64, step by step, and in whole trainings."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers.tiny import SCHEDULE, STEPS, bert, content, make, zeros
from torch import nn
from transformers import TrainerCallback

from hf_sparse import Pruner, PruningConfig, PruningConfigError
from hf_sparse.algorithms import ALGORITHMS, ConstrainedTraining, register_algorithm
from hf_sparse.algorithms.elsa import ELSA
from hf_sparse.schedulers import PruningSchedule
from hf_sparse.training.new_run import new_run


TOTAL_STEPS, LEARNING_RATE, STRENGTH = 14, 0.02, 0.3
PRUNE_STEPS = (3, 5, 7, 9, 10)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 4, bias=False))
    return layers.to(dtype)


def loss_of(layers, step):
    generator = torch.Generator().manual_seed(step)
    inputs, labels = torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator)
    return nn.functional.cross_entropy(layers(inputs.to(layers[0].weight.dtype)), labels)


def lowest(scores, count):
    """Whether each score is kept, where the `count` lowest are not."""
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(stable=True)[:count]] = False
    return kept.view(scores.shape)


def keep_global(scores, ratio):
    flat = torch.cat([score.flatten() for score in scores])
    kept = lowest(flat, round(ratio * len(flat)))
    return [
        part.view(score.shape) for part, score in zip(kept.split([s.numel() for s in scores]), scores, strict=True)
    ]


def keep_by_layer(scores, ratio):
    """Rounded down, and one more in the layer with the larger remainder where the total needs it."""
    shares = [ratio * score.numel() for score in scores]
    counts = [int(share) for share in shares]
    if sum(counts) < round(sum(shares)):
        counts[max(range(len(shares)), key=lambda index: shares[index] - counts[index])] += 1
    assert sum(counts) == round(sum(shares))
    return [lowest(score, count) for score, count in zip(scores, counts, strict=True)]


def keep_2of4(scores, ratio):
    """All units compete, but the two best of each four are kept."""
    best = [
        torch.zeros(score.numel() // 4, 4).scatter(1, score.view(-1, 4).topk(2).indices, torch.inf).view(score.shape)
        for score in scores
    ]
    return keep_global([score + extra for score, extra in zip(scores, best, strict=True)], ratio)


def keep_2x2(scores, ratio):
    blocks = [nn.functional.avg_pool2d(score[None], 2)[0] for score in scores]
    kept = keep_global(blocks, ratio)
    return [block.repeat_interleave(2, 0).repeat_interleave(2, 1) for block in kept]


@dataclass
class Reference:
    """ADMM as it is written down, x, z and u apart, in float64."""

    keep: object
    target: float
    algorithm: ELSA

    def __post_init__(self):
        self.layers = model(torch.float64)
        self.x = list(self.layers.parameters())
        self.z, self.u = None, [torch.zeros_like(x) for x in self.x]
        self.optimizer = torch.optim.AdamW(self.x, lr=LEARNING_RATE, weight_decay=0.1)
        self.strength, self.masks = None, None

    def project(self, points, ratio):
        moments = [self.optimizer.state[x]["exp_avg_sq"] for x in self.x]
        power = self.algorithm.weighting
        return self.keep([moment**power * point**2 for moment, point in zip(moments, points, strict=True)], ratio)

    def step(self, step):
        loss_of(self.layers, step).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            if self.z is not None:
                for x, z, u, mask in zip(self.x, self.z, self.u, self.kept, strict=True):
                    z[mask] = x[mask]
                    x -= self.strength * (x - z + u)
            if step in PRUNE_STEPS:
                self.prune(PRUNE_STEPS.index(step) + 1)
            if self.masks is not None:
                for x, mask in zip(self.x, self.masks, strict=True):
                    x[~mask] = 0

    def prune(self, prune_step):
        fraction = prune_step / len(PRUNE_STEPS)
        ratio = self.target * (1 - (1 - fraction) ** 3)
        if fraction == 1:
            self.masks, self.z = self.project([x.detach() for x in self.x], ratio), None
            return
        points = [x.detach() + u for x, u in zip(self.x, self.u, strict=True)]
        self.kept = self.project(points, ratio)
        self.z = [point * mask for point, mask in zip(points, self.kept, strict=True)]
        self.u = [u + x.detach() - z for x, u, z in zip(self.x, self.u, self.z, strict=True)]
        before, self.strength = self.strength, STRENGTH * fraction
        if before is not None:
            self.u = [u * before / self.strength for u in self.u]


CASES = {
    "global": ({"target_sparsity": 0.75}, keep_global, 0.75),
    "layer": ({"target_sparsity": 0.75, "scope": "layer"}, keep_by_layer, 0.75),
    "2:4": ({"pattern": "2:4"}, keep_2of4, 0.5),
    "2x2": ({"pattern": "2x2", "target_sparsity": 0.75}, keep_2x2, 0.75),
}


@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_equations(case, weighting):
    options, keep, target = CASES[case]
    algorithm = ELSA(STRENGTH, weighting)
    reference, layers = Reference(keep, target, algorithm), model()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    pruner = Pruner(layers, PruningConfig(algorithm=algorithm, **options))
    run = new_run(pruner, PruningSchedule(start=3, end=10, every=2), optimizer, 0)
    run.start()
    for step in range(1, TOTAL_STEPS + 1):
        loss_of(layers, step).backward()
        run.before_step(step)
        optimizer.step()
        optimizer.zero_grad()
        run.after_step(step)
        reference.step(step)
        for weight, x in zip(layers.parameters(), reference.x, strict=True):
            torch.testing.assert_close(weight.double(), x, rtol=1e-3, atol=1e-4)
        state = run.tensors()
        assert bool(state) == (3 <= step < 10)
        for kind, tensors in {"kept": reference.kept, "dual": reference.u}.items() if state else ():
            for found, expected in zip(state[kind].values(), tensors, strict=True):
                torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-4)
        if state:
            residual = sum((x.detach()[~kept] ** 2).sum() for x, kept in zip(reference.x, reference.kept, strict=True))
            norm = sum((x.detach() ** 2).sum() for x in reference.x)
            assert run.metrics()["constraint_residual"] == pytest.approx(float((residual / norm).sqrt()), rel=1e-3)
            assert run.metrics()["constraint_strength"] == reference.strength
    for mask, expected in zip(pruner.masks.values(), reference.masks, strict=True):
        assert torch.equal(mask, expected)
    assert pruner.masked_sparsity() == target


def masks_of_half(pattern):
    """All masks of a 4x4 matrix with half of the units of a pattern."""
    units = {"unstructured": 8, "2x2": 4, "2:4": 8}[pattern]
    if pattern == "2:4":
        groups = [torch.tensor([index in kept for index in range(4)]) for kept in itertools.combinations(range(4), 2)]
        return [torch.cat(chosen).view(2, 4) for chosen in itertools.product(groups, repeat=2)]
    found = []
    for kept in itertools.combinations(range(units), units // 2):
        mask = torch.tensor([index in kept for index in range(units)])
        if pattern == "2x2":
            mask = mask.view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
        found.append(mask.view(-1, 4))
    return found


@pytest.mark.parametrize("pattern", ["unstructured", "2x2", "2:4"])
def test_no_sparse_point_is_nearer_than_the_projection(pattern):
    """In the norm that the second moment weighs, over all masks of the pattern."""
    masks = masks_of_half(pattern)
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(4, len(masks[0]), bias=False))
    config = PruningConfig(algorithm="elsa", pattern=pattern, target_sparsity=0.5)
    pruner, point, moment = Pruner(layers, config), layers[0].weight.detach().clone(), torch.rand(len(masks[0]), 4)
    pruner.select(1, 1, {"0.weight": ELSA().scores(point, moment)})
    distances = {float((moment * (point * mask - point) ** 2).sum()) for mask in masks}
    found = float((moment * (layers[0].weight.detach() - point) ** 2).sum())
    assert len(distances) > 5 and found == pytest.approx(min(distances), rel=1e-5)


METHODS = {
    "defaults": {},
    "n_of_m": {"pattern": "2:4"},
    "blocks": {"pattern": "4x1", "scope": "layer", "algorithm_kwargs": {"strength": 1.0, "weighting": 0.0}},
    "channels": {"pattern": "channel", "optim": "rmsprop", "algorithm_kwargs": {"weighting": 0.5}},
    "sgd": {"optim": "sgd", "learning_rate": 0.1, "algorithm_kwargs": {"weighting": 0.0}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, method):
    """Before, between and after the prune steps, of which the last reaches the target exactly."""
    options = {"algorithm": "elsa", "target_sparsity": 0.5, "save_strategy": "steps", "save_steps": 1, **SCHEDULE}
    options |= METHODS[method]
    trainer = make(tmp_path / "whole", **options)
    trainer.train()
    assert zeros(trainer.model) == 2112
    for name, mask in trainer.sparsity_callback.pruner.masks.items():
        weight = dict(trainer.model.named_parameters())[name]
        assert not weight.detach().view(torch.int32)[~mask].any()
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    assert [step for step, log in logs.items() if "constraint_residual" in log] == [3, 4, 5, 6, 7]
    assert all(log["sparsity"] == 0 for step, log in logs.items() if step < 8)
    expected = content(tmp_path / "whole" / f"checkpoint-{STEPS}")
    for step in (1, 4, 5, 9):
        resumed = make(tmp_path / f"from{step}", model=bert(seed=99), **options | {"save_steps": STEPS})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert content(tmp_path / f"from{step}" / f"checkpoint-{STEPS}") == expected, step


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_weights_of_16_bits_have_a_sparse_point_of_32(tmp_path):
    options = {"algorithm": "elsa", "target_sparsity": 0.5, **SCHEDULE}
    trainer = make(tmp_path, model=bert().bfloat16(), callbacks=[StopAt(6)], **options)
    trainer.train()
    state = trainer.sparsity_callback.run.tensors()
    assert {tensor.dtype for tensors in state.values() for tensor in tensors.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16()).any() for tensor in state["dual"].values())


@pytest.mark.parametrize("optim, name", [("sgd", "SGD"), ("adafactor", "Adafactor"), ("adagrad", "Adagrad")])
def test_optimizers_without_a_second_moment_are_refused_before_training(tmp_path, optim, name):
    trainer = make(tmp_path, target_sparsity=0.5, algorithm="elsa", optim=optim, **SCHEDULE)
    message = f'`algorithm` "elsa" projects .* which {name} does not: use `optim="adamw_torch"`'
    with pytest.raises(NotImplementedError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pattern": "neuron"}, '`algorithm` "elsa" selects weights and blocks, not units of `pattern` "neuron"'),
        ({"keep_zeros": True}, '`keep_zeros` is set, but with `algorithm` "elsa" pruned weights may come back'),
        ({"criterion": "magnitude"}, "leave `criterion` out"),
        ({"algorithm_kwargs": {"strength": 0.0}}, '"strength" is 0.0: it must be above 0 and at most 1'),
        ({"algorithm_kwargs": {"weighting": 2.0}}, '"weighting" is 2.0: it must be from 0 to 1'),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(PruningConfigError, match=message):
        PruningConfig(algorithm="elsa", target_sparsity=0.5, **options)


def test_frozen_weights_and_a_single_prune_step_are_refused(tmp_path):
    model = bert()
    model.bert.encoder.requires_grad_(False)
    with pytest.raises(PruningConfigError, match='`algorithm` "elsa" needs gradients, but "bert.encoder'):
        make(tmp_path, model=model, algorithm="elsa", target_sparsity=0.5)
    trainer = make(tmp_path, algorithm="elsa", target_sparsity=0.5, prune_start=4, prune_end=4)
    with pytest.raises(ValueError, match="`prune_start` and `prune_end` are both step 4: lower `prune_start`"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_registered_algorithm_goes_through_whole_runs(tmp_path, monkeypatch):
    """Prunes the largest weights: a constant strength, and scores of its own."""
    monkeypatch.setattr(ALGORITHMS, "_members", dict(ALGORITHMS._members))

    @register_algorithm("largest")
    @dataclass(frozen=True)
    class Largest(ConstrainedTraining):
        pull: float = 0.5
        needs_second_moment = False

        def strength_at(self, fraction):
            return self.pull

        def scores(self, point, second_moment):
            assert second_moment is None
            return -point.abs()

    options = {"algorithm": "largest", "algorithm_kwargs": {"pull": 0.25}}
    trainer = make(tmp_path, target_sparsity=0.5, scope="layer", **options, **SCHEDULE)
    before = {name: weight.detach().abs().mean() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = [log["constraint_strength"] for log in trainer.state.log_history if "constraint_strength" in log]
    assert logged == [0.25] * 5
    for name, mask in trainer.sparsity_callback.pruner.masks.items():
        weight = dict(trainer.model.named_parameters())[name].detach()
        assert mask.sum() == weight.numel() // 2 and weight[mask].abs().mean() < before[name]
    trainer.save_model()
    trainer.create_model_card()
    assert "Pruning algorithm: largest (pull=0.25)." in (tmp_path / "README.md").read_text()
