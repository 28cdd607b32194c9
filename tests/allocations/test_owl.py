"""OWL: sparsities worked out by hand."""

import pytest
import torch
from helpers.dense_layers import dense_layer

from hf_sparse.allocations import LayerSize
from hf_sparse.allocations.owl import OWL, outlier_ratio


def layers(*outliers, units=(100, 100, 100), **bounds):
    return [
        LayerSize(name, count, 10, count // 10, measured=share, **bounds)
        for name, count, share in zip("abc", units, outliers)
    ]


def test_outlier_ratio_by_hand():
    """Mean 2.9: of ten scores one is above 5 times it, three (4, 4, 17.5) above it, none 6.1 times it."""
    scores = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 4.0, 4.0, 17.5])
    assert outlier_ratio([scores]) == 0.1 and outlier_ratio([scores], multiple=1) == 0.3
    assert outlier_ratio([scores], multiple=6.1) == 0
    assert outlier_ratio([torch.ones(5)], multiple=1) == 0  # above the mean, not equal to it


def test_the_outlier_ratio_is_over_all_weights_of_a_block():
    """Alone neither has an outlier; together, with a mean of 1.9, the ten tens are outliers."""
    low, high = torch.full((90,), 1.0), torch.full((10,), 10.0)
    assert outlier_ratio([low]) == outlier_ratio([high]) == 0
    assert outlier_ratio([low.view(9, 10), high]) == 0.1


def test_scores_that_are_missing_or_not_finite_are_refused():
    for scores in ([], [torch.empty(0)], [torch.tensor([1.0, float("nan")])], [torch.tensor([float("inf")])]):
        with pytest.raises(ValueError, match="needs finite scores"):
            outlier_ratio(scores)


def test_by_hand():
    """Outliers 5, 1 and 3 %: mean 3, so 2 away at most: 0.5 ∓ 0.08 and 0.5."""
    shares = OWL().allocate(0.5, layers(0.05, 0.01, 0.03))
    assert shares == pytest.approx({"a": 0.42, "b": 0.58, "c": 0.5})
    # weighted mean (4·200 + 1·100 + 1·100)/400 = 2.5: 1.5 away at most, on both sides
    shares = OWL().allocate(0.7, layers(0.04, 0.01, 0.01, units=(200, 100, 100)))
    assert shares == pytest.approx({"a": 0.62, "b": 0.78, "c": 0.78})


def test_equal_outlier_ratios_give_equal_sparsities():
    for share in (0.0, 0.03):
        assert OWL().allocate(0.6, layers(share, share, share)) == pytest.approx(dict.fromkeys("abc", 0.6))


def test_options_by_hand():
    """λ is the largest distance; a score of more than m times the mean, 2.9, is an outlier."""
    assert OWL(lambda_=0.2).allocate(0.5, layers(0.05, 0.01, 0.03)) == pytest.approx({"a": 0.3, "b": 0.7, "c": 0.5})
    weight = torch.tensor([[0.5, -0.5, 0.5, -0.5, 0.5], [0.5, 0.5, 4.0, -4.0, 17.5]])
    block = [dense_layer(weight[:1], torch.eye(5)), dense_layer(weight[1:], torch.eye(5))]
    assert [OWL(m=m).measure(block) for m in (1.0, 5.0, 6.1)] == [[0.3] * 2, [0.1] * 2, [0] * 2]


def test_the_target_is_met_within_bounds():
    """Offsets -0.08, 0.08 and 0, the second at most 0.52: the others have 0.98 together, 0.08 apart."""
    sizes = layers(0.05, 0.01, 0.03)
    sizes[1] = LayerSize("b", 100, 10, 10, most=0.52, measured=0.01)
    assert OWL().allocate(0.5, sizes) == pytest.approx({"a": 0.45, "b": 0.52, "c": 0.53})


def test_a_missing_measurement_names_the_layer():
    with pytest.raises(ValueError, match='"owl" needs a measurement of each layer, but "b" has none, one of 2:'):
        OWL().allocate(0.5, layers(0.05, None, None))
