"""The contract of learned masks: a run computes what autograd computes in a model with parametrized weights."""

from dataclasses import dataclass, replace

import pytest
import torch
from helpers.invariants import exactly_positive_zero
from helpers.tiny import SCHEDULE, make, same, weights, zeros
from torch import nn
from torch.func import functional_call

from hf_sparse import Pruner, PruningConfig, register_algorithm
from hf_sparse.algorithms import ALGORITHMS, LearnedMask, MaskContext
from hf_sparse.patterns import get_pattern
from hf_sparse.schedulers import PruningSchedule
from hf_sparse.training.learned_masks.parts import WeightParts
from hf_sparse.training.new_run import new_run


MEMBERS = [name for name in ALGORITHMS.names() if issubclass(ALGORITHMS[name], LearnedMask)]
SCHEDULED, STEPS, RATE, TARGET = PruningSchedule(2, 14, 2), 17, 0.05, 0.6


@dataclass(frozen=True)
class Signed(LearnedMask):
    """A member as a user writes one, with the default of `pull_back`: both factors are trained."""

    learning_rate: float = 0.03

    default_scope = "global"

    def init(self, dense, mask, context):
        return {"scores": dense.abs(), "scale": torch.ones_like(dense)}

    def weight(self, theta, dense, mask, context):
        scores = theta["scores"]
        return dense * (mask + (scores - scores.detach()) * theta["scale"])

    def penalty(self, theta, dense, mask, context):
        return context.progress * theta["scale"].square().sum() / context.num_weights

    def scores(self, theta, dense, context):
        return theta["scores"] * theta["scale"]


@pytest.fixture
def signed():
    register_algorithm("signed")(Signed)
    yield "signed"
    del ALGORITHMS._members["signed"]


class Net(nn.Module):
    """Two linear layers in float64, and inputs for them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = (nn.Linear(size, 8, bias=False, dtype=torch.float64) for size in (12, 8))
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 3
        self.inputs = torch.randn(STEPS, 5, 12, generator=generator, dtype=torch.float64)

    def forward(self, step):
        return self.second(torch.tanh(self.first(self.inputs[step - 1]))).square().mean()


def optimizers(parameters):
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)


def trained(config, overflows=()):
    """Yields the run and the weights after each step of the run of hf_sparse."""
    model = Net()
    pruner = Pruner(model, config)
    optimizer, rate = optimizers(model.parameters())
    run = new_run(pruner, SCHEDULED, optimizer, seed=0)
    run.start()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(step).backward()
        if step in overflows:
            model.first.weight.grad[0, 0] = torch.inf
        run.before_step(step)
        if step not in overflows:
            optimizer.step()
        run.after_step(step)
        rate.step()
        for name, weight in model.named_parameters():
            assert exactly_positive_zero(weight, pruner.masks[name])
        yield run, weights(model)


class Parametrized:
    """The same training by autograd of the whole model, whose weights are functions of leaves."""

    def __init__(self, algorithm):
        self.algorithm, self.model = algorithm, Net()
        self.dense = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.dense.items()}
        self.theta = {name: algorithm.init(weight, self.masks[name], None) for name, weight in self.dense.items()}
        self.leaves = [value.requires_grad_() for theta in self.theta.values() for value in theta.values()]
        self.optimizer, self.rate = optimizers([weight.requires_grad_() for weight in self.dense.values()])
        self.adam = torch.optim.Adam(self.leaves) if self.leaves else None

    def context(self, step):
        length = SCHEDULED.end - SCHEDULED.start
        progress = min(1.0, max(0.0, (step - SCHEDULED.start) / length))
        number = sum(weight.numel() for weight in self.dense.values())
        return MaskContext(step, progress, 0.0, TARGET, number, get_pattern("unstructured"), None)

    def step(self, step, ratio):
        context = self.context(step)
        parts = [(name, self.theta[name], weight, self.masks[name], context) for name, weight in self.dense.items()]
        loss = functional_call(self.model, {name: self.algorithm.weight(*rest) for name, *rest in parts}, (step,))
        learns = step <= SCHEDULED.end
        penalties = [self.algorithm.penalty(*rest) for _, *rest in parts] if learns else []
        sum((penalty for penalty in penalties if penalty is not None), loss).backward()
        if learns and self.adam is not None:
            self.adam.param_groups[0]["lr"] = self.algorithm.learning_rate * self.rate.get_last_lr()[0] / RATE
            self.adam.step()
        self.optimizer.step()
        self.rate.step()
        for tensor in (*self.leaves, *self.dense.values()):
            tensor.grad = None
        if ratio is not None:
            self.select(ratio, self.context(step + 1), step == SCHEDULED.end)

    @torch.no_grad()
    def select(self, ratio, context, is_last):
        early = {name: self.algorithm.early_mask(self.theta[name], self.dense[name], context) for name in self.dense}
        total = context.num_weights
        if not is_last and None not in early.values():
            if ratio * total <= sum(int((~mask).sum()) for mask in early.values()) <= TARGET * total:
                self.masks = early
                return
        scores = [self.algorithm.scores(self.theta[name], self.dense[name], context) for name in self.dense]
        order = torch.cat([part.flatten().float() for part in scores]).argsort(stable=True)
        kept = torch.ones(total, dtype=torch.bool).index_fill(0, order[: round(ratio * total)], False)
        parts = kept.split([weight.numel() for weight in self.dense.values()])
        self.masks = {name: part.view(self.dense[name].shape) for name, part in zip(self.dense, parts, strict=True)}

    def weights(self):
        return {name: (weight * self.masks[name]).detach() for name, weight in self.dense.items()}


def ratios(config):
    (group,) = config.resolve_groups().values()
    total = SCHEDULED.total
    steps = {step: SCHEDULED.prune_step(step) for step in range(1, STEPS + 1)}
    return {
        step: None if count is None else group.scheduler.update_sparsity_ratio(TARGET, count, total, {})
        for step, count in steps.items()
    }


def check(name, options, **runs):
    config = PruningConfig(target_sparsity=TARGET, algorithm=name, algorithm_kwargs=options, scope="global")
    reference = Parametrized(ALGORITHMS.create(name, options))
    by_step = ratios(config)
    returned = 0
    for step, (run, now) in enumerate(trained(config, **runs), start=1):
        before = reference.masks
        reference.step(step, by_step[step])
        returned += sum(int((reference.masks[key] & ~before[key]).sum()) for key in before)
        for key, expected in reference.weights().items():
            torch.testing.assert_close(now[key], expected, rtol=1e-9, atol=1e-12, msg=f"{key} after step {step}")
        if step < SCHEDULED.end:
            for key, theta in reference.theta.items():
                for kind, expected in theta.items():
                    torch.testing.assert_close(run.trained.theta[key][kind], expected.detach(), rtol=1e-9, atol=1e-12)
    assert returned, "no pruned weight came back: the test says little"


@pytest.mark.parametrize(
    "name, options",
    [
        ("movement", {"learning_rate": 0.1}),
        ("movement", {"learning_rate": 0.1, "init_scale": 0.0}),
        ("soft_movement", {"learning_rate": 0.2, "lambda_": 5.0, "threshold": 0.5}),
        ("soft_movement", {"learning_rate": 0.1, "lambda_": 0.0, "threshold": 1e-3}),
        ("sr_ste", {"decay": 0.05}),
    ],
)
def test_a_run_is_a_training_of_parametrized_weights(name, options):
    check(name, options)


def test_so_is_that_of_a_member_without_a_closed_form(signed):
    check(signed, {})


@pytest.mark.parametrize("name", MEMBERS)
def test_closed_forms_are_the_gradients_of_weight_and_penalty(name):
    algorithm, pattern = ALGORITHMS.create(name), get_pattern("2:4" if ALGORITHMS[name].needs_whole_units else "4x1")
    generator = torch.Generator().manual_seed(0)
    dense, gradient, noise = torch.randn(3, 6, 1, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(8).expand(6, 1, 8) % 4 < 2
    context = MaskContext(3, 0.4, 0.3, 0.5, 48, pattern, lambda index: noise.sigmoid().float())
    theta = algorithm.init(dense, mask, context)
    totals = algorithm.totals(theta, dense, mask, context)
    arguments = theta, dense, mask
    context = replace(context, totals=totals)
    found = algorithm.pull_back(*arguments, gradient.clone(), context)
    expected = LearnedMask.pull_back(algorithm, *arguments, gradient.clone(), context)
    assert found[0].keys() == expected[0].keys() == theta.keys()
    for key in theta:
        torch.testing.assert_close(found[0][key], expected[0][key])
        assert found[0][key].shape == dense.shape
    assert (found[1] is not None) == algorithm.trains_weights == (expected[1] is not None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("name", ["movement", "sr_ste"])
def test_gradients_that_overflow_enter_nothing(name):
    """As at steps 3 and 4, the second of which has a prune step, of a gradient scaler, which skips them."""
    config = PruningConfig(target_sparsity=TARGET, algorithm=name)
    before = {}
    for step, (run, now) in enumerate(trained(config, overflows=(3, 4)), start=1):
        if step == 3:
            assert same(now, before["weights"]) and run.trained.updates == 2
            assert all(same(theta, before["theta"][key]) for key, theta in run.trained.theta.items())
        assert all(torch.isfinite(weight).all() for weight in now.values())
        theta = {key: {kind: value.clone() for kind, value in own.items()} for key, own in run.trained.theta.items()}
        before = {"weights": now, "theta": theta}
    assert run.pruner.sparsity() == pytest.approx(round(TARGET * 160) / 160)


def test_a_whole_run_of_a_new_member(tmp_path, signed):
    trainer = make(tmp_path, target_sparsity=0.5, algorithm=signed, **SCHEDULE)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert zeros(trainer.model) == 2112 and logs[-1]["sparsity"] == 0.5
    assert 0 < logs[5]["mask_penalty"] < 1.1 and "mask_penalty" not in logs[-1]


def test_noise_is_a_hash_of_the_position_in_the_whole_weight(monkeypatch):
    """Parts of any size get the same numbers."""
    import hf_sparse.training.learned_masks.parts as module

    model = nn.Sequential(nn.Linear(64, 40, bias=False))
    run = Pruner(model, PruningConfig(target_sparsity=0.5))
    (layer,), shard = run.groups[0].layers, run.shards["0.weight"]
    whole = WeightParts(layer, shard)
    monkeypatch.setattr(module, "chunk_size", lambda device: 4 * 300)
    split = WeightParts(layer, shard)
    assert len(whole.views(shard.tensor)) == 1 and len(split.views(shard.tensor)) == 10
    expected = whole.noise(0, key=7)
    assert torch.equal(split.join([split.noise(part, 7) for part in range(10)]), expected.view(40, 64))
    assert 0 < expected.min() and expected.max() < 1 and abs(expected.mean() - 0.5) < 0.02
    assert not torch.equal(whole.noise(0, key=8), expected)
