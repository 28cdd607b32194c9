"""The contract of every registered allocation."""

import pytest

from hf_sparse.allocations import ALLOCATIONS, LayerSize


FREE = [
    LayerSize("square", 768 * 768, 768, 768, outliers=0.01),
    LayerSize("wide", 768 * 3072, 768, 3072, outliers=0.02),
    LayerSize("kernel", 64 * 3 * 49, 64, 3, positions=49, outliers=0.0),
    LayerSize("tiny", 6, 2, 3, outliers=0.05),
    LayerSize("blocks", 768 * 768 // 4, 768, 768, outliers=0.01),
]
BOUNDED = [
    LayerSize("held", 1000, 10, 100, least=0.1, most=0.4, outliers=0.03),
    LayerSize("owing", 500, 50, 10, least=0.6, outliers=0.0),
    LayerSize("fixed", 300, 30, 10, least=0.5, most=0.5, outliers=0.02),
    LayerSize("free", 4000, 400, 10, outliers=0.01),
]
RATIOS = [0.0, 1e-6, 0.15, 0.3, 0.5, 0.8, 0.97, 1.0]


def mean(shares, layers):
    return sum(shares[layer.name] * layer.units for layer in layers) / sum(layer.units for layer in layers)


@pytest.mark.parametrize("layers", [FREE, BOUNDED, FREE[:1]], ids=["free", "bounded", "single"])
@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_the_mean_is_the_target_within_bounds_and_no_sparsity_decreases(name, layers):
    allocate = ALLOCATIONS.create(name).allocate
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
    for ratio in (0.05, 0.95):
        with pytest.raises(ValueError, match=f"sparsity {ratio} cannot be distributed: the layers' bounds allow"):
            ALLOCATIONS.create(name).allocate(ratio, BOUNDED)
