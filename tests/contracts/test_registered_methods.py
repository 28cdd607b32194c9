"""The contract of registration: a member that a user registers decides whole runs, in training and one-shot pruning.

Learning rate 0: the weights change by pruning alone, so that the result follows from the initial weights.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from helpers.mixed import Mixed
from helpers.tiny import PRUNE_STEPS, SCHEDULE, STEPS, bert, content, make, weights
from safetensors.torch import load_file
from torch import nn

from hf_sparse import (
    Allocation,
    Criterion,
    GradientCriterion,
    MeasuringAllocation,
    OneshotConfig,
    Pattern,
    PruningConfig,
    PruningConfigError,
    Requires,
    Scheduler,
    Solver,
    SparsityReport,
    plan_oneshot,
    prune_oneshot,
    register_allocation,
    register_criterion,
    register_curve,
    register_pattern,
    register_scheduler,
    register_solver,
)
from hf_sparse.files import CARD_FILE, CONFIG_FILE, REPORT_FILE
from hf_sparse.patterns import get_pattern
from hf_sparse.patterns.base import pairwise_sum
from hf_sparse.statistics import GramMatrix


@dataclass(frozen=True)
class Signed(Criterion):
    sign: int = 1

    def score(self, weight, statistic):
        return self.sign * weight.detach().float()


@dataclass(frozen=True)
class SignedSum(GradientCriterion):
    """The sum of the weights at all steps, if they have gradients."""

    sign: int = 1
    decay: float = 0.5

    def saliency(self, weight, gradient, out):
        assert gradient.shape == weight.shape and gradient.any()
        return torch.mul(weight, self.sign, out=out)


@dataclass(frozen=True)
class First(Criterion):
    requires = Requires.POSITION

    def score(self, weight, statistic):
        return -(statistic % 2**31).float()


@dataclass(frozen=True)
class QuietInputs(Criterion):
    """Prunes the columns with the largest inputs."""

    requires = Requires.INPUT_NORMS
    default_scope = "row"

    def score(self, weight, statistic):
        return -statistic.expand(weight.shape)


@dataclass(frozen=True)
class Mirrored(Pattern):
    """A unit is a weight and the one in the mirrored column."""

    syntax = r"mirrored"
    example = "mirrored"

    def check(self, rows, columns):
        return f'pattern "{self}" needs the input size divisible by 2' if columns % 2 else None

    def unit_shape(self, shape_RPC):
        return (*shape_RPC[:2], shape_RPC[2] // 2)

    def pool(self, scores_RPC):
        half = scores_RPC.shape[2] // 2
        return pairwise_sum(torch.stack([scores_RPC[..., :half], scores_RPC.flip(2)[..., :half]]), 0) / 2

    def expand(self, keep_U, shape_RPC):
        return torch.cat([keep_U, keep_U.flip(2)], dim=2)


class Halves(Scheduler):
    def update_sparsity_ratio(self, aggressive_ratio, current_prune_step, total_prune_steps, masks):
        return aggressive_ratio / (1 if current_prune_step >= total_prune_steps else 2)


def squared(t, target):
    return target * t**2


@dataclass(frozen=True)
class InOrder(Allocation):
    """Layers are pruned up to their bounds in the order of their names, or in reverse."""

    reverse: bool = False

    def allocate(self, target, layers):
        order = sorted(layers, key=self.rank, reverse=self.reverse)
        shares = {layer.name: layer.least for layer in layers}
        left = target * sum(layer.units for layer in layers) - sum(layer.least * layer.units for layer in layers)
        for layer in order:
            units = min(left, (layer.most - layer.least) * layer.units)
            shares[layer.name] += units / layer.units
            left -= units
        return shares

    def rank(self, layer):
        return layer.name


@dataclass(frozen=True)
class ByLargestScore(InOrder, MeasuringAllocation):
    requires = Requires.DENSE_NORMS

    def measure(self, layers):
        return [float(max(score.max() for score in layer.scores())) for layer in layers]

    def rank(self, layer):
        return layer.measured


@dataclass(frozen=True)
class Rescale(Solver):
    """Multiplies the remaining weights."""

    factor: float = 2.0

    def solve_batched(self, requests, statistic=None):
        assert statistic is None
        return [
            (torch.where(request.mask_RC, self.factor * request.weight_RC, 0.0), request.mask_RC)
            for request in requests
        ]


@dataclass(frozen=True)
class LoudestColumns(Solver):
    """Keeps the columns with the largest inputs, without an update."""

    requires = Requires.GRAM
    selects = True

    def prepare(self, gram):
        assert isinstance(gram, GramMatrix)
        return gram.norms

    def solve_batched(self, requests, statistic=None):
        solved = []
        for request in requests:
            count = round(request.sparsity * len(statistic))
            mask = torch.ones_like(request.weight_RC, dtype=torch.bool)
            mask[:, statistic.argsort(stable=True)[:count]] = False
            solved.append((torch.where(mask, request.weight_RC, 0.0), mask))
        return solved


@dataclass(frozen=True)
class FirstColumns(Solver):
    selects = True

    def solve_batched(self, requests, statistic=None):
        assert statistic is None
        masks = [torch.ones_like(request.weight_RC, dtype=torch.bool) for request in requests]
        for mask, request in zip(masks, requests, strict=True):
            mask[:, : round(request.sparsity * mask.shape[1])] = False
        pairs = zip(requests, masks, strict=True)
        return [(torch.where(mask, request.weight_RC, 0.0), mask) for request, mask in pairs]


@pytest.fixture(autouse=True)
def members():
    for name, criterion in {"signed": Signed, "signed_sum": SignedSum, "first": First, "quiet": QuietInputs}.items():
        register_criterion(name)(criterion)
    register_pattern("mirror")(Mirrored)
    register_scheduler("halves")(Halves)
    register_curve("squared")(squared)
    register_allocation("in_order")(InOrder)
    register_allocation("by_largest_score")(ByLargestScore)
    register_solver("rescale")(Rescale)
    register_solver("loudest_columns")(LoudestColumns)
    register_solver("first_columns")(FirstColumns)


# Training


def train(folder, resume_from=None, **options):
    options = {"learning_rate": 0.0, "save_strategy": "steps", "save_steps": 4, **SCHEDULE, **options}
    trainer = make(folder, target_sparsity=0.5, **options)
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def zeros_of(folder):
    saved = load_file(folder / "model.safetensors")
    return {layer.name: saved[layer.name] == 0 for layer in SparsityReport.load(folder / REPORT_FILE).layers}


def lowest_half(scores):
    """True for the lower half of all values, of equal ones the first."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    is_lowest = torch.zeros(len(flat), dtype=torch.bool)
    is_lowest[flat.argsort(stable=True)[: len(flat) // 2]] = True
    parts = is_lowest.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def same_masks(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def dense_scores(layers):
    dense = weights(bert())
    return {name: dense[name] for name in layers}


def expected_signed(zeros, trainer):
    return lowest_half({name: -score for name, score in dense_scores(zeros).items()})


def expected_first(zeros, trainer):
    return {name: torch.arange(zero.numel()).view(zero.shape) >= zero.numel() / 2 for name, zero in zeros.items()}


def expected_mirrored(zeros, trainer):
    scores = {name: score + score.flip(1) for name, score in dense_scores(zeros).items()}
    units = lowest_half({name: score[:, : score.shape[1] // 2] for name, score in scores.items()})
    return {name: torch.cat([unit, unit.flip(1)], dim=1) for name, unit in units.items()}


def expected_in_order(zeros, trainer):
    """2,112 of 4,224 zeros, at most 90 % of each layer, the last names first."""
    counts, left = {}, 2112
    for name in sorted(zeros, reverse=True):
        counts[name] = min(left, -(-9 * zeros[name].numel() // 10))
        left -= counts[name]
    assert {name: int(zero.sum()) for name, zero in zeros.items()} == counts
    return zeros


def logged(zeros, trainer, shares):
    """The shares of the 2,112 zeros at the prune steps."""
    sparsities = {log["step"]: log["sparsity"] for log in trainer.state.log_history if "sparsity" in log}
    assert [sparsities[step] for step in PRUNE_STEPS] == [round(round(share * 2112) / 4224, 6) for share in shares]
    return zeros


SCOPE = {"scope": "layer"}
TRAINING = {
    "criterion": ({"criterion": Signed(sign=-1)}, expected_signed),
    "criterion with gradients": ({"criterion": SignedSum(sign=-1)}, expected_signed),
    "criterion with positions": ({"criterion": "first", **SCOPE}, expected_first),
    "pattern": ({"pattern": Mirrored(), "criterion": "signed"}, expected_mirrored),
    "allocation": (
        {"allocation": InOrder(reverse=True), "criterion": "magnitude", "max_sparsity_per_layer": 0.9, **SCOPE},
        expected_in_order,
    ),
    "scheduler": ({"scheduler": "halves"}, lambda *run: logged(*run, (0.5, 0.5, 0.5, 1))),
    "curve": ({"sparsity_decay_type": "squared"}, lambda *run: logged(*run, (1 / 16, 4 / 16, 9 / 16, 1))),
}


@pytest.mark.parametrize("family", TRAINING)
def test_training(family, tmp_path):
    options, expected = TRAINING[family]
    trainer = train(tmp_path / "whole", **options)
    zeros = zeros_of(tmp_path / "whole")
    assert sum(int(zero.sum()) for zero in zeros.values()) == 2112
    assert same_masks(zeros, expected(zeros, trainer))

    train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"), **options)
    last = f"checkpoint-{STEPS}"
    assert content(tmp_path / "resumed" / last) == content(tmp_path / "whole" / last)

    config = PruningConfig.from_file(tmp_path / "whole" / CONFIG_FILE)
    assert config == PruningConfig(target_sparsity=0.5, **SCHEDULE, **options)
    (settings,) = json.loads((tmp_path / "whole" / CARD_FILE).read_text())["settings"]
    (group,) = config.resolve_groups().values()
    assert settings == group.to_dict()


def test_training_refuses_registered_methods_that_need_inputs(tmp_path):
    usable = "first, fisher, gradient, greedy_movement, magnitude, mfac, obert, random, signed, signed_sum, "
    usable += "snip, snip_momentum, taylor"
    for options, message in (
        ({"criterion": "quiet"}, f'`criterion` "quiet" needs inputs of the weights, .* or one of {usable}.'),
        ({"allocation": "by_largest_score", **SCOPE}, "or one of erdos_renyi, in_order, uniform."),
    ):
        with pytest.raises(PruningConfigError, match=message):
            make(tmp_path, target_sparsity=0.5, **options)


# One-shot pruning


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 8, bias=False))


BATCHES = [torch.randn(20, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(8.0)]
NO_DATA = None


def oneshot(model, batches, **options):
    config = OneshotConfig(target_sparsity=0.5, **options)
    plan = plan_oneshot(model, batches, config)
    assert [layer.name for layer in plan.layers] == ["0.weight", "1.weight"]
    report = prune_oneshot(model, batches, config, progress=False)
    assert report.sparsity == 0.5
    return {layer.name: model.get_parameter(layer.name) == 0 for layer in report.layers}


def test_oneshot_criteria(model):
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    zeros = oneshot(model, NO_DATA, criterion=Signed(sign=-1), scope="global")
    assert same_masks(zeros, lowest_half({name: -weight for name, weight in dense.items()}))
    model.load_state_dict(dense)
    zeros = oneshot(model, NO_DATA, criterion="first", scope="layer")
    assert all(torch.equal(zero.flatten(), torch.arange(48) >= 24) for zero in zeros.values())
    model.load_state_dict(dense)
    zeros = oneshot(model, BATCHES, criterion="quiet")
    assert torch.equal(zeros["0.weight"], (torch.arange(8) >= 4).expand(6, 8))
    with pytest.raises(PruningConfigError, match='`criterion` "quiet" needs calibration data, but there is none'):
        oneshot(model, NO_DATA, criterion="quiet")


def test_a_oneshot_criterion_with_gradients():
    model = bert().eval()
    dense = weights(model)
    batch = {"input_ids": torch.arange(2, 18).view(2, 8), "labels": torch.tensor([0, 1])}
    config = OneshotConfig(target_sparsity=0.5, criterion=SignedSum(decay=1.0))
    report = prune_oneshot(model, [batch], config, progress=False)
    expected = lowest_half({layer.name: dense[layer.name] for layer in report.layers})
    assert same_masks({name: model.get_parameter(name) == 0 for name in expected}, expected)
    with pytest.raises(PruningConfigError, match='"signed_sum" weights later batches more'):
        OneshotConfig(target_sparsity=0.5, criterion=SignedSum())


def test_a_oneshot_pattern(model):
    dense = {name: weight + weight.flip(1) for name, weight in model.state_dict().items()}
    zeros = oneshot(model, NO_DATA, pattern="mirrored", criterion="signed")
    units = lowest_half({name: score[:, : score.shape[1] // 2] for name, score in dense.items()})
    assert same_masks(zeros, {name: torch.cat([unit, unit.flip(1)], dim=1) for name, unit in units.items()})
    assert get_pattern("mirrored") == Mirrored()


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_oneshot_allocations(model, criterion):
    options = {"criterion": criterion, "scope": "layer", "max_sparsity_per_layer": 0.75}
    batches = BATCHES if criterion == "wanda" else NO_DATA
    zeros = oneshot(model, batches, allocation=InOrder(reverse=True), **options)
    assert [int(zero.sum()) for zero in zeros.values()] == [12, 36]


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_allocation_gets_its_own_measurements(model, criterion, reverse):
    """The first layer has the largest score, and is pruned the least, or the most."""
    model[0].weight.data[0, 7] = 1e3
    options = {"allocation": ByLargestScore(reverse), "scope": "layer", "max_sparsity_per_layer": 0.75}
    zeros = oneshot(model, BATCHES, criterion=criterion, **options)
    assert [int(zero.sum()) for zero in zeros.values()] == ([36, 12] if reverse else [12, 36])
    with pytest.raises(PruningConfigError, match='"wanda"|"by_largest_score" needs calibration data'):
        oneshot(model, NO_DATA, criterion=criterion, **options)


@pytest.mark.parametrize(
    "criterion, batches", [("magnitude", NO_DATA), ("random", NO_DATA), ("signed", BATCHES), ("wanda", BATCHES)]
)
def test_a_solver_that_updates_weights(model, criterion, batches):
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    scope = "row" if criterion == "wanda" else "global"
    zeros = oneshot(model, batches, criterion=criterion, scope=scope, solver=Rescale(factor=3.0))
    for name, zero in zeros.items():
        assert torch.equal(model.get_parameter(name), torch.where(zero, 0.0, 3.0 * dense[name]))


@pytest.mark.parametrize("forwards", [1, 2])
def test_a_solver_that_selects(model, forwards):
    zeros = oneshot(model, BATCHES, solver="loudest_columns", forwards=forwards)
    assert torch.equal(zeros["0.weight"], (torch.arange(8) < 4).expand(6, 8))
    assert set(zeros["1.weight"].sum(0).tolist()) == {0, 8}
    with pytest.raises(PruningConfigError, match='`solver` "loudest_columns" needs calibration data'):
        oneshot(model, NO_DATA, solver="loudest_columns")


def test_a_solver_that_selects_without_a_gram_matrix(model):
    zeros = oneshot(model, BATCHES, solver="first_columns")
    assert torch.equal(zeros["0.weight"], (torch.arange(8) < 4).expand(6, 8))
    assert torch.equal(zeros["1.weight"], (torch.arange(6) < 3).expand(8, 6))


def test_a_solver_updates_every_kind_of_weight():
    mixed = Mixed()
    dense = {name: weight.clone() for name, weight in mixed.named_parameters()}
    config = OneshotConfig(target_sparsity=0.5, criterion="magnitude", solver="rescale")
    report = prune_oneshot(mixed, NO_DATA, config, progress=False)
    assert report.sparsity == 0.5 and len(report.layers) == 5
    for layer in report.layers:
        weight = mixed.get_parameter(layer.name)
        assert torch.equal(weight, torch.where(weight == 0, 0.0, 2.0 * dense[layer.name]))
