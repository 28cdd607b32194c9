"""Allocations: sparsities worked out by hand."""

import numpy as np
import pytest

from hf_sparse.allocations import LayerSize
from hf_sparse.allocations.erdos_renyi import ErdosRenyi
from hf_sparse.allocations.uniform import Uniform
from hf_sparse.selection.budgets import largest_remainder


def test_uniform_is_equal_in_all_layers_within_their_bounds():
    layers = [LayerSize("a", 100, 10, 10), LayerSize("b", 300, 30, 10)]
    assert Uniform().allocate(0.3, layers) == {"a": 0.3, "b": 0.3}
    # a is at most 0.2, which leaves (0.5·400 - 0.2·100) / 300 = 0.6 for b
    capped = [LayerSize("a", 100, 10, 10, most=0.2), layers[1]]
    assert Uniform().allocate(0.5, capped) == pytest.approx({"a": 0.2, "b": 0.6})
    # a is at least 0.9, which leaves (0.5·400 - 0.9·100) / 300 for b
    raised = [LayerSize("a", 100, 10, 10, least=0.9), layers[1]]
    assert Uniform().allocate(0.5, raised) == pytest.approx({"a": 0.9, "b": 110 / 300})


def test_erdos_renyi_by_hand():
    """Densities in proportion to (10 + 10)/100 = 0.2 and (10 + 40)/400 = 0.125; 100·0.2ε + 400·0.125ε = 250 gives
    ε = 250/70. A kernel counts with its positions: (4 + 8 + 9)/(4·8·9)."""
    layers = [LayerSize("square", 100, 10, 10), LayerSize("wide", 400, 10, 40)]
    expected = {"square": 1 - 0.2 * 250 / 70, "wide": 1 - 0.125 * 250 / 70}
    assert ErdosRenyi().allocate(0.5, layers) == pytest.approx(expected)
    kernel = [LayerSize("kernel", 288, 4, 8, positions=9), LayerSize("square", 100, 10, 10)]
    shares = ErdosRenyi().allocate(0.5, kernel)
    assert (1 - shares["kernel"]) / (1 - shares["square"]) == pytest.approx((21 / 288) / 0.2)


def test_bounds_without_room_are_refused():
    with pytest.raises(ValueError, match="sparsity 0.5 cannot be distributed: the layers' bounds allow 0 to 0.2"):
        Uniform().allocate(0.5, [LayerSize("a", 100, 10, 10, most=0.2)])
    with pytest.raises(ValueError, match="5 units cannot be distributed: the bounds allow 6 to 7"):
        largest_remainder(5, [1.0, 1.0], [3, 3], [3, 4])


def test_largest_remainder_by_hand():
    assert largest_remainder(7, [2.5, 2.5, 2.0], [0, 0, 0], [9, 9, 9]).tolist() == [3, 2, 2]
    assert largest_remainder(4, [1.9, 1.2, 0.9], [0, 0, 0], [9, 9, 9]).tolist() == [2, 1, 1]
    assert largest_remainder(0, [0.0, 0.0], [0, 0], [5, 5]).tolist() == [0, 0]
    assert largest_remainder(10, [5.0, 5.0], [0, 0], [5, 5]).tolist() == [5, 5]
    assert largest_remainder(6, [4.0, 2.0], [0, 3], [9, 9]).tolist() == [3, 3]


def test_largest_remainder_is_exact_within_bounds_and_near_the_shares():
    random = np.random.default_rng(0)
    for _ in range(300):
        count = int(random.integers(1, 9))
        least = random.integers(0, 50, count)
        most = least + random.integers(0, 50, count)
        total = int(random.integers(least.sum(), most.sum() + 1))
        shares = random.random(count) * 80
        counts = largest_remainder(total, shares, least, most)
        assert counts.sum() == total and (least <= counts).all() and (counts <= most).all()
        fitting = np.clip(shares, least, most)
        if abs(shares.sum() - total) < 1e-9 and (fitting == shares).all():
            assert (abs(counts - shares) < 1).all()


def test_largest_remainder_of_fitting_shares_is_less_than_one_away():
    random = np.random.default_rng(1)
    for total in random.integers(0, 1000, 50).tolist():
        shares = random.random(7)
        shares *= total / shares.sum()
        counts = largest_remainder(total, shares, [0] * 7, [2000] * 7)
        assert counts.sum() == total and (abs(counts - shares) < 1).all()
