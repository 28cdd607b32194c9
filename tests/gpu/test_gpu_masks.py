"""Masks on a GPU are those of the CPU, bit for bit."""

import copy
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import bits_equal
from torch import nn

from hf_sparse import OneshotConfig, Pruner, PruningConfig, Requires
from hf_sparse.criteria import CRITERIA
from hf_sparse.distributed import build_shards
from hf_sparse.engine.masks import MaskStore
from hf_sparse.engine.parameter_group import ParameterGroup
from hf_sparse.engine.resolve import resolve_layers
from hf_sparse.patterns import get_pattern


SHAPES = {"wide": (48, 96), "tall": (128, 40), "square": (64, 64)}  # enough units for a sample and a bracket
PATTERNS = ("unstructured", "2:4", "1:4", "4x1", "4x8", "channel", "channel:in")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model(dtype, seed=0):
    """Matrices of one size of units in each pattern, with ties and zeros among the weights."""
    generator = torch.Generator().manual_seed(seed)
    layers = nn.ModuleDict({name: nn.Linear(*shape[::-1], bias=False) for name, shape in SHAPES.items()})
    for layer in layers.values():
        weight = torch.randn(layer.weight.shape, generator=generator)
        weight[::5] = (weight[::5] * 4).round() / 4
        layer.weight.data = weight.to(dtype)
    return layers


def gradients(step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def masks(dtype, device, config, steps=3):
    """The masks of one prune step after some observations, and the statistics, all on the CPU."""
    layers = model(dtype).to(device)
    (resolved,), _ = resolve_layers(layers, config, observes_inputs=isinstance(config, OneshotConfig))
    group = ParameterGroup(resolved)
    shards, _ = build_shards(dict(layers.named_parameters()))
    store = MaskStore({name: (shard.tensor.shape, shard.tensor.device) for name, shard in shards.items()})
    statistics = None
    if resolved.requires & Requires.GRADIENTS:
        for step in range(steps):
            for name, gradient in gradients(step, dtype).items():
                layers[name].weight.grad = gradient.to(device)
            group.observe(shards)
    elif resolved.requires & Requires.INPUT_NORMS:
        norms = {name: gradients(9, torch.float32)[name].abs().sum(0) for name in SHAPES}
        statistics = {}
        for name, norm in norms.items():
            prepared = resolved.criterion.prepare_statistic(layers[name].weight, norm.to(device))
            statistics[f"{name}.weight"] = prepared.expand(SHAPES[name])
    group.prune(1, 1, shards, store, statistics)
    totals = {name: statistic.total.cpu() for name, statistic in group.statistics.items()}
    return {name: store[name].cpu() for name in shards}, totals


@contextmanager
def on_cpu():
    """The code for CPUs, without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sparse.numerics.NUMPY_DEVICES", ("cpu",))
        patch.setattr("hf_sparse.kernels.KERNEL_DEVICES", ())
        yield


_OF_COUPLED_UNITS = Requires.INPUT_VARIANCES | Requires.GRAM | Requires.BLOCK_INFLUENCES
# Products and factors of matrices are rounded differently, see test_gpu_block_fisher.py.
_NOT_BITWISE = _OF_COUPLED_UNITS | Requires.GRADIENT_HISTORY
OF_SINGLE_WEIGHTS = [name for name in CRITERIA.names() if not CRITERIA[name].requires & _NOT_BITWISE]


def combinations():
    for text in PATTERNS:
        for scope in ("row", "layer", "global"):
            same_units = text not in ("channel", "channel:in")  # their units differ in size from layer to layer
            if (scope != "row" or get_pattern(text).has_rows) and (scope != "global" or same_units):
                yield text, scope


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("criterion", OF_SINGLE_WEIGHTS)
def test_masks_are_those_of_the_cpu(device, criterion, dtype):
    differing = []
    for pattern, scope in combinations():
        target = get_pattern(pattern).implied_sparsity or 0.6
        options = {"target_sparsity": target, "criterion": criterion, "pattern": pattern, "scope": scope}
        if CRITERIA[criterion].requires & Requires.INPUTS:
            if get_pattern(pattern).implied_sparsity:  # whose units compete within their group
                options["scope"] = None
            config = OneshotConfig(**options)
        else:
            config = PruningConfig(**options)
        with on_cpu():
            expected, expected_totals = masks(dtype, "cpu", config)
        found, totals = masks(dtype, device, config)
        counts = {name: int((found[name] != mask).sum()) for name, mask in expected.items()}
        if any(counts.values()) or not all(bits_equal(totals[name], total) for name, total in expected_totals.items()):
            sums = {name: int((totals[name] != total).sum()) for name, total in expected_totals.items()}
            differing.append(f"{pattern}, {scope}: {counts} weights of the masks, {sums} of the statistics")
        assert sum(int((~mask).sum()) for mask in found.values()) > 0
    assert not differing, "\n".join(differing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"min_sparsity_per_layer": 0.3, "max_sparsity_per_layer": 0.85}], ids=str)
def test_all_steps_of_a_schedule_are_those_of_the_cpu(device, dtype, options):
    """Observe, update and enforce, with weights and gradients that are the same on both devices."""

    def run(name):
        layers = model(dtype).to(name)
        pruner = Pruner(layers, PruningConfig(target_sparsity=0.8, **options))
        digests = []
        for step in range(6):
            for layer, gradient in gradients(step, dtype).items():
                layers[layer].weight.grad = gradient.to(name)
            assert pruner.observe()
            digests.append(pruner.update(step // 2 + 1, 3).sparsity if step % 2 else pruner.sparsity())
            with torch.no_grad():
                for parameter in layers.parameters():
                    parameter.add_(0.25)
            pruner.enforce()
            digests.append(pruner.masks.digest())
        return digests, {name: weight.cpu() for name, weight in layers.state_dict().items()}

    with on_cpu():
        expected, weights = run("cpu")
    digests, others = run(device)
    assert digests == expected
    assert all(bits_equal(others[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_enforcing_leaves_positive_zeros_and_no_other_change(device, dtype):
    weight = torch.randn(8, 300, dtype=torch.float64).to(dtype)
    weight[:, ::7] = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf] * 2, dtype=dtype)[:, None]
    weight = weight.to(device)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    tensors = {"contiguous": weight.clone(), "strided": weight.t().clone().t(), "empty": weight[:0].clone()}
    store = MaskStore({name: (tensor.shape, tensor.device) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        store.replace(name, mask[: len(tensor)])
    store.enforce(tensors)
    for tensor in tensors.values():
        expected = torch.where(mask[: len(tensor)], weight[: len(tensor)], torch.zeros((), dtype=dtype, device=device))
        assert bits_equal(tensor, expected)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_refused(device, bad):
    layers = model(torch.float32).to(device)
    pruner = Pruner(layers, PruningConfig(target_sparsity=0.5))
    for parameter in layers.parameters():
        parameter.grad = torch.full_like(parameter, 1e37)  # finite, but their sum is not
    assert pruner.observe()
    before = {name: statistic.total.clone() for name, statistic in pruner.groups[0].statistics.items()}
    layers["tall"].weight.grad[3, 4] = bad
    assert not pruner.observe()
    assert all(torch.equal(pruner.groups[0].statistics[name].total, total) for name, total in before.items())


def test_scores_that_are_nan_name_the_layer(device):
    layers = model(torch.float32).to(device)
    pruner = Pruner(layers, PruningConfig(target_sparsity=0.5, criterion="magnitude"))
    layers["wide"].weight.data[2, 3] = torch.nan
    with pytest.raises(ValueError, match='scores are nan in "wide.weight"'):
        pruner.update(1, 1)


def test_state_of_a_gpu_is_read_on_the_cpu_and_back(device):
    layers, config = model(torch.float32).to(device), PruningConfig(target_sparsity=0.5)
    pruner = Pruner(layers, config)
    for name, gradient in gradients(0, torch.float32).items():
        layers[name].weight.grad = gradient.to(device)
    pruner.observe()
    pruner.update(1, 1)
    tensors, values = pruner.state_dict()
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    for target in ("cpu", device):
        other = Pruner(copy.deepcopy(layers).to(target), config)
        other.load_state_dict((tensors, values))
        assert other.masks.digest() == pruner.masks.digest()
        totals = other.groups[0].statistics
        assert all(totals[name].total.device.type == torch.device(target).type for name in totals)
