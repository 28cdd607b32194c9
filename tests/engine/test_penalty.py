"""The penalty of parameter groups: its gradients and its value against float64 autograd of the formula."""

import math

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.mixed import NAMES, Mixed, matrices
from helpers.tiny import bert

from hf_sparse import Pruner, PruningConfig
from hf_sparse.distributed import Shard, ShardRegion, full_region, regions_of_range
from hf_sparse.distributed.communicator import SingleProcess
from hf_sparse.engine.penalty import new_group_penalty


def penalties(model, **options):
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="magnitude", **options))
    return [
        new_group_penalty(group.options.penalty, group.options, pruner.shards, pruner.communicator)
        for group in pruner.groups
    ]


def added(model, strength, **options):
    """What the penalty adds to the gradients of all parameters, and its value."""
    start = {name: torch.randn(value.shape).to(value.dtype) for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = start[name].clone()
    (penalty,) = penalties(model, **options)
    penalty.observe()
    penalty.add_gradients(strength)
    return {name: value.grad - start[name] for name, value in model.named_parameters()}, penalty.value()


def units_of(pattern, name, parameter):
    """Yields the weights of each unit of a parameter of `Mixed`, with autograd."""
    shape = parameter.shape
    ids = torch.arange(parameter.numel()).view(shape)
    for matrix in matrices(name, ids):
        rows, positions, columns = matrix.shape
        high, wide = {"channel": (1, columns), "channel:in": (rows, 1)}.get(pattern) or map(int, pattern.split("x"))
        for row in range(0, rows, high):
            for column in range(0, columns, wide):
                part = matrix[row : row + high, :, column : column + wide]
                # A kernel position is a block of its own; a channel has all of them.
                for unit in [part] if "channel" in pattern else [part[:, p] for p in range(positions)]:
                    yield parameter.reshape(-1)[torch.tensor(unit.reshape(-1).astype(int))]


@pytest.mark.parametrize("pattern", ["4x1", "2x4", "1x8", "channel", "channel:in"])
def test_group_lasso_of_units_of_one_weight(pattern):
    model = Mixed()
    with torch.no_grad():
        model.linear.weight[:4] = 0  # units that are zero
    scope = {"scope": "layer"} if "channel" in pattern else {}
    changes, value = added(model, 0.5, penalty="group_lasso", pattern=pattern, **scope)
    total = 0.0
    for name in NAMES:
        weight = model.get_parameter(name).detach().double().requires_grad_()
        units = list(units_of(pattern, name, weight))
        assert sum(len(unit) for unit in units) == weight.numel()
        norms = [math.sqrt(len(unit)) * unit.norm() for unit in units if unit.any()]
        (expected,) = torch.autograd.grad(0.5 * sum(norms), weight)
        torch.testing.assert_close(changes[name].double(), expected, atol=1e-6, rtol=1e-5)
        total += float(sum(norms).detach())
    assert value == pytest.approx(total, rel=1e-6)
    assert not changes["linear.weight"][:4].any() and not changes["linear.bias"].any()


@pytest.mark.parametrize(
    "options", [{"penalty": "l1", "pattern": "4x1"}, {"penalty": "group_lasso"}, {"penalty": "l1"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_weights(options, dtype):
    model = Mixed().to(dtype)
    with torch.no_grad():
        model.linear.weight[:, 3] = 0
    changes, value = added(model, 0.25, **options)
    for name in NAMES:
        torch.testing.assert_close(changes[name], 0.25 * model.get_parameter(name).detach().sign(), atol=0.02, rtol=0)
    assert value == sum(float(model.get_parameter(name).detach().float().abs().sum()) for name in NAMES)


def test_n_of_m_has_units_of_single_weights():
    model = bert()
    changes, _ = added(model, 0.25, **{"penalty": "group_lasso"}, pattern="unstructured")
    pruner = Pruner(model, PruningConfig(pattern="2:4", criterion="magnitude", penalty="group_lasso"))
    (group,) = pruner.groups
    for shard in pruner.shards.values():
        shard.parameter.grad = torch.zeros_like(shard.parameter)
    new_group_penalty(group.options.penalty, group.options, pruner.shards).add_gradients(0.25)
    for name, shard in pruner.shards.items():
        torch.testing.assert_close(shard.gradient, changes[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("pattern", ["neuron:1", "head", "layer"])
def test_group_lasso_of_coupled_units(architecture, pattern):
    model = ARCHITECTURES[architecture].model()
    changes, value = added(model, 0.5, penalty="group_lasso", pattern=pattern)
    (group,) = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="magnitude", pattern=pattern)).groups
    weights = {layer.name: model.get_parameter(layer.name).detach().double() for layer in group.layers}
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    total = 0.0
    for units in group.options.units:
        for unit in range(units.num_units):
            parts = [
                weights[part.name].index_select(part.dim, part.indices(torch.tensor([unit]))).reshape(-1)
                for part in units.slices
                if part.name in weights and part.expert is None
            ]
            total = total + math.sqrt(sum(map(len, parts))) * torch.cat(parts).norm()
    gradients = torch.autograd.grad(0.5 * total, list(weights.values()))
    for name, expected in zip(weights, gradients, strict=True):
        torch.testing.assert_close(changes[name].double(), expected, atol=1e-6, rtol=1e-5)
    assert value == pytest.approx(float(total.detach()), rel=1e-6)
    assert not any(change.any() for name, change in changes.items() if name not in weights)


def test_weights_without_gradients_are_left_alone():
    model = Mixed()
    for penalty in (*penalties(model, penalty="l1"), *penalties(model, penalty="group_lasso", pattern="4x1")):
        penalty.observe()
        penalty.add_gradients(1.0)
    assert all(parameter.grad is None for parameter in model.parameters())


class Part(Shard):
    """The part that one of several ranks would hold."""

    def __init__(self, parameter, regions_by_rank, rank):
        super().__init__(parameter)
        self.regions_by_rank, self.rank = regions_by_rank, rank
        self.local_regions, self.primary_rank = regions_by_rank[rank], regions_by_rank.index(regions_by_rank[rank])
        self._tensor, self._gradient = self._cut(parameter.detach()), self._cut(parameter.grad)

    def _cut(self, whole):
        pieces = [whole[region.slices_in(full_region(self.shape))].reshape(-1) for region in self.local_regions]
        flat = torch.cat(pieces) if pieces else whole.new_empty(0)
        return flat.view(self.local_regions[0].shape) if len(self.local_regions) == 1 else flat

    @property
    def tensor(self):
        return self._tensor

    @property
    def gradient(self):
        return self._gradient


class Recorded(SingleProcess):
    """Sums over the ranks of which each records its part first, and then computes with the sums."""

    def __init__(self, rank, sums):
        super().__init__()
        self.rank, self._sums, self._calls = rank, sums, 0

    def all_reduce(self, tensor):
        self._sums.setdefault(self._calls, {})[self.rank] = tensor.clone()
        tensor.copy_(sum(self._sums[self._calls].values()))
        self._calls += 1


def flat_split(shape, ranks=3):
    """As ZeRO splits, at any position, with a rank that holds nothing."""
    numel = math.prod(shape)
    ends = [0, 1 + numel // 5, 1 + 3 * numel // 5, numel][: ranks + 1]
    return (*(regions_of_range(shape, *pair) for pair in zip(ends, ends[1:])), ())


def dim_split(dim, replicas=1):
    def split(shape):
        where = min(dim, len(shape) - 1)
        middle = 1 + shape[where] // 3
        whole = full_region(shape)
        left = ShardRegion(whole.start, (*shape[:where], middle, *shape[where + 1 :]))
        right = ShardRegion((*whole.start[:where], middle, *whole.start[where + 1 :]), whole.stop)
        return ((left,), (right,)) * replicas

    return split


SPLITS = {"rows": dim_split(0), "columns": dim_split(1), "flat": flat_split, "replicas": dim_split(0, 2)}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "2x4", "channel", "channel:in", "neuron:1", "head"])
def test_ranks_that_hold_parts_add_the_gradients_of_one_process(pattern, split):
    make = bert if pattern in ("neuron:1", "head") else Mixed
    options = {"penalty": "group_lasso", "pattern": pattern} | ({"scope": "layer"} if "channel" in pattern else {})
    model, generator = make(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    (whole,) = penalties(model, **options)
    parts = {name: SPLITS[split](tuple(shard.shape)) for name, shard in whole.shards.items()}
    ranks, sums = range(len(next(iter(parts.values())))), {}
    by_rank = [{name: Part(whole.shards[name].parameter, parts[name], rank) for name in parts} for rank in ranks]
    values = {}
    for turn in range(3):
        for rank, shards in enumerate(by_rank):
            group = new_group_penalty(whole.penalty, whole.options, shards, Recorded(rank, sums))
            group.observe()
            if turn == 2:  # the sums have the parts of all ranks by now, and the value those of their sums
                group.add_gradients(0.5)
            values[rank] = group.value()
    whole.observe()
    whole.add_gradients(0.5)
    assert list(values.values()) == [pytest.approx(whole.value(), rel=1e-12)] * len(by_rank)
    for name, shard in whole.shards.items():
        for part in (shards[name] for shards in by_rank):
            assert torch.equal(part._cut(shard.gradient), part.gradient)
