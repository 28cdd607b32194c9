"""Allocations from measurements of the dense model: values worked out by hand, and those of independent code."""

import itertools
import math

import pytest
import torch
from helpers.dense_layers import dense_layer

from hf_sparse.allocations import DenseLayer, LayerSize
from hf_sparse.allocations import lsa as lsa_module
from hf_sparse.allocations.dlp import DLP
from hf_sparse.allocations.global_budget import GlobalBudget
from hf_sparse.allocations.lsa import LSA, least_error
from hf_sparse.statistics import GramMatrix


def layers(*values, units=(100, 100, 100), **bounds):
    return [
        LayerSize(name, count, 10, count // 10, measured=value, **bounds)
        for name, count, value in zip("abc", units, values, strict=True)
    ]


@pytest.mark.parametrize("allocation", [DLP(alpha=0.1), LSA(beta=0.1)])
def test_sparsities_by_hand(allocation):
    """Values 1, 2 and 5: offsets 0, 0.2·1/4 and 0.2, whose mean is 0.25/3, or 0.0625 weighted by 200, 100 and 100."""
    shares = allocation.allocate(0.5, layers(1.0, 2.0, 5.0))
    assert shares == pytest.approx({"a": 0.5 - 0.25 / 3, "b": 0.55 - 0.25 / 3, "c": 0.7 - 0.25 / 3})
    shares = allocation.allocate(0.7, layers(1.0, 2.0, 5.0, units=(200, 100, 100)))
    assert shares == pytest.approx({"a": 0.6375, "b": 0.6875, "c": 0.8375})
    with pytest.raises(ValueError, match="measured by finite values"):
        allocation.allocate(0.5, layers(1.0, float("nan"), 2.0))


def test_dlp_measures_the_median_of_all_weights_of_a_block():
    """With norms 2 and 1 the scores are 2, 3, 8, 1 and, of the second layer, 20 and 5: the third and fourth of six
    are 3 and 5, of which torch's median is the lower."""
    inputs = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    first = dense_layer(torch.tensor([[-1.0, 3.0], [4.0, -1.0]]), inputs)
    second = dense_layer(torch.tensor([[10.0, 5.0]]), inputs)
    assert DLP().measure([first, second]) == [3.0, 3.0] and DLP().measure([second]) == [5.0]


def greedy_error(row, gram, count):
    """In float64, by the definition: the error of every set that adds one input to those removed."""
    removed = []
    for _ in range(count):
        rest = [j for j in range(len(row)) if j not in removed]

        def error(j):
            inputs = [*removed, j]
            return float(row[inputs] @ gram[inputs][:, inputs] @ row[inputs])

        removed.append(min(rest, key=error))
    return float(row[removed] @ gram[removed][:, removed] @ row[removed])


def test_the_least_error_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 10, generator=generator), torch.randn(30, 10, generator=generator)
    x[:, 3] = x[:, 2] + 0.1 * x[:, 3]  # inputs that can cancel
    gram = (x.double().t() @ x.double()).contiguous()
    for share in (0.2, 0.5, 1.0):
        expected = sum(greedy_error(row, gram, int(10 * share)) for row in weight.double())
        assert least_error(weight, dense_layer(weight, x).inputs[0], share) == pytest.approx(expected, rel=1e-4)
    # Never far above the least over all sets.
    row = weight[:1].double()
    sets = (list(chosen) for chosen in itertools.combinations(range(10), 5))
    least = min(float(row[0, chosen] @ gram[chosen][:, chosen] @ row[0, chosen]) for chosen in sets)
    assert least <= least_error(weight[:1], dense_layer(weight, x).inputs[0]) + 1e-3
    # With all inputs removed it is the energy of the outputs, in groups of any size.
    energy = float((x @ weight.t()).square().sum())
    assert least_error(weight, dense_layer(weight, x).inputs[0], 1.0, columns=3) == pytest.approx(energy, rel=1e-4)


def test_lsa_measures_the_mean_over_the_matrices_of_a_block(monkeypatch):
    """Independent inputs: half of the weights, those with the least w²·‖x‖², are removed from each row."""
    inputs = torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    first = dense_layer(torch.tensor([[1.0, 1.0, 3.0, -2.0], [5.0, 1.0, 1.0, 4.0]]), inputs)  # 1 + 4, and 1 + 4
    second = dense_layer(torch.tensor([[2.0, 5.0, 1.0, 5.0]]), inputs)  # 4 + 1
    fused = DenseLayer([*first.weights, *second.weights], [*first.inputs, *second.inputs], first.pattern)
    assert LSA().measure([first, second]) == [7.5, 7.5] and LSA().measure([fused]) == [7.5]
    monkeypatch.setattr(lsa_module, "ROWS", 1)  # the first row stands for both
    assert LSA().measure([dense_layer(torch.tensor([[1.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), inputs)]) == [10.0]


def test_the_least_error_of_many_columns_and_half_precision():
    generator = torch.Generator().manual_seed(1)
    weight, gram = torch.randn(4, 300, generator=generator), GramMatrix(300)
    gram.observe(torch.randn(600, 300, generator=generator))
    before = weight.clone()
    by_groups = least_error(weight, gram)
    at_once = least_error(weight, gram, columns=300)
    assert by_groups == pytest.approx(at_once, rel=0.2) and torch.equal(weight, before)
    assert least_error(weight.bfloat16(), gram) == pytest.approx(by_groups, rel=0.02)


def test_a_global_budget_by_hand():
    """Independent inputs: errors w²·‖x‖² of 1, 16, 64, 256 and, times a sensitivity of 16, of 16, 64, 256, 1024: half
    of all are below 64, three of the first layer and one of the second."""
    inputs = torch.diag(torch.tensor([1.0, 2.0]))
    first = dense_layer(torch.tensor([[1.0, 2.0], [8.0, 8.0]]), inputs)
    second = dense_layer(torch.tensor([[1.0, 1.0], [4.0, 4.0]]), inputs, sensitivity=16.0)
    counts = GlobalBudget().measure([first, second])
    found = [{2 ** (index / 4 - 256): int(n) for index, n in enumerate(count) if n} for count in counts]
    assert found == [{1.0: 1, 16.0: 1, 64.0: 1, 256.0: 1}, {16.0: 1, 64.0: 1, 256.0: 1, 1024.0: 1}]
    sizes = [LayerSize(name, 4, 2, 2, measured=count) for name, count in zip("ab", counts, strict=True)]
    shares = GlobalBudget().allocate(3 / 8, sizes)
    assert shares == pytest.approx({"a": 0.5, "b": 0.25})
    assert GlobalBudget().allocate(5 / 8, sizes) == pytest.approx({"a": 0.75, "b": 0.5})
    # Blocks are units: their errors are means.
    blocks = dense_layer(torch.tensor([[1.0, 2.0], [8.0, 8.0]]), inputs, pattern="2x1")
    (count,) = GlobalBudget().measure([blocks])
    assert {index / 4 - 256 for index in count.nonzero()[0]} == {
        math.floor(4 * math.log2(error)) / 4 for error in ((1 + 64) / 2, (16 + 256) / 2)
    }


def test_zeros_and_layers_without_effect_are_pruned_first():
    zeros = dense_layer(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.eye(2))
    unused = dense_layer(torch.ones(2, 2), torch.eye(2), sensitivity=0.0)
    counts = GlobalBudget().measure([zeros, unused])
    sizes = [LayerSize(name, 4, 2, 2, measured=count) for name, count in zip("ab", counts, strict=True)]
    assert GlobalBudget().allocate(6 / 8, sizes) == pytest.approx({"a": 0.5, "b": 1.0})
    with pytest.raises(ValueError, match="needs finite scores"):
        GlobalBudget().measure([dense_layer(torch.full((2, 2), float("nan")), torch.eye(2))])
