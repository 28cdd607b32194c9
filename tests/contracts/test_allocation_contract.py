"""The contract of every registered allocation."""

from dataclasses import replace

import pytest
import torch
from helpers.dense_layers import dense_layer

from hf_sparse.allocations import ALLOCATIONS, DenseLayer, LayerSize, MeasuringAllocation


FREE = [
    LayerSize("square", 768 * 768, 768, 768),
    LayerSize("wide", 768 * 3072, 768, 3072),
    LayerSize("kernel", 64 * 3 * 49, 64, 3, positions=49),
    LayerSize("tiny", 6, 2, 3),
    LayerSize("blocks", 768 * 768 // 4, 768, 768),
]
BOUNDED = [
    LayerSize("held", 1000, 10, 100, least=0.1, most=0.4),
    LayerSize("owing", 500, 50, 10, least=0.6),
    LayerSize("fixed", 300, 30, 10, least=0.5, most=0.5),
    LayerSize("free", 4000, 400, 10),
]
RATIOS = [0.0, 1e-6, 0.15, 0.3, 0.5, 0.8, 0.97, 1.0]


def measured(allocation, layers):
    """The layers with measurements of random weights and inputs, of another magnitude in each."""
    if not isinstance(allocation, MeasuringAllocation):
        return layers
    generator = torch.Generator().manual_seed(0)
    values = []
    for number in range(len(layers)):
        weight = torch.randn(6, 8, generator=generator) ** (1 + 2 * number)
        values += allocation.measure([dense_layer(weight, torch.randn(40, 8, generator=generator))])
    return [replace(layer, measured=value) for layer, value in zip(layers, values, strict=True)]


def mean(shares, layers):
    return sum(shares[layer.name] * layer.units for layer in layers) / sum(layer.units for layer in layers)


@pytest.mark.parametrize("layers", [FREE, BOUNDED, FREE[:1]], ids=["free", "bounded", "single"])
@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_the_mean_is_the_target_within_bounds_and_no_sparsity_decreases(name, layers):
    allocation = ALLOCATIONS.create(name)
    allocate, layers = allocation.allocate, measured(allocation, layers)
    low = mean({layer.name: layer.least for layer in layers}, layers)
    high = mean({layer.name: layer.most for layer in layers}, layers)
    before = None
    for ratio in [low, *(ratio for ratio in RATIOS if low < ratio < high), high]:
        shares = allocate(ratio, layers)
        assert list(shares) == [layer.name for layer in layers]
        assert mean(shares, layers) == pytest.approx(ratio, abs=1e-9)
        assert all(layer.least - 1e-12 <= shares[layer.name] <= layer.most + 1e-12 for layer in layers)
        if before:
            assert all(before[layer] <= shares[layer] + 1e-9 for layer in shares)
        before = shares


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_a_target_outside_the_bounds_is_refused(name):
    allocation = ALLOCATIONS.create(name)
    for ratio in (0.05, 0.95):
        with pytest.raises(ValueError, match=f"sparsity {ratio} cannot be distributed: the layers' bounds allow"):
            allocation.allocate(ratio, measured(allocation, BOUNDED))


MEASURING = [name for name in ALLOCATIONS.names() if issubclass(ALLOCATIONS[name], MeasuringAllocation)]


@pytest.mark.parametrize("name", MEASURING)
def test_measurements_distinguish_layers_and_are_required(name):
    allocation = ALLOCATIONS.create(name)
    shares = allocation.allocate(0.5, measured(allocation, FREE))
    assert len({round(share, 6) for share in shares.values()}) > 1
    with pytest.raises(ValueError, match=f'`allocation` "{name}" needs a measurement of each layer, but "square" has'):
        allocation.allocate(0.5, FREE)


@pytest.mark.parametrize("name", MEASURING)
def test_measurements_of_equal_layers_give_equal_sparsities(name):
    allocation = ALLOCATIONS.create(name)
    layer = dense_layer(torch.arange(1.0, 49.0).view(6, 8), torch.eye(8))
    values = [allocation.measure([layer])[0] for _ in FREE]
    shares = allocation.allocate(
        0.6, [replace(size, measured=value) for size, value in zip(FREE, values, strict=True)]
    )
    assert shares == pytest.approx(dict.fromkeys(shares, 0.6))


@pytest.mark.parametrize("name", MEASURING)
def test_one_value_is_measured_of_each_layer_of_a_block(name):
    """Also of a layer of several matrices, and of weights in half precision."""
    allocation = ALLOCATIONS.create(name)
    weights = [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    single, *experts = (dense_layer(weight, torch.eye(8)) for weight in weights)
    fused = DenseLayer(
        [*experts[0].weights, *experts[1].weights], [*experts[0].inputs, *experts[1].inputs], single.pattern
    )
    half = DenseLayer([weight.bfloat16() for weight in single.weights], single.inputs, single.pattern)
    assert len(allocation.measure([single, fused, half])) == 3
