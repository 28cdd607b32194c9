"""Each distance against its formula, written out."""

import math

import pytest
import torch
from torch import tensor

from hf_sparse.training.distillation.hidden import hidden_loss, layer_pairs, relative_error
from hf_sparse.training.distillation.terms import binary_cross_entropy, divergence, squared_error


def softmax(values, temperature):
    exponents = [math.exp(value / temperature) for value in values]
    return [value / sum(exponents) for value in exponents]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_divergence_is_that_of_both_distributions(temperature):
    student, teacher = [0.3, -1.2, 2.0], [1.5, 0.0, -0.5]
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    expected = temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    assert divergence(tensor(student), tensor(teacher), temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_the_divergence_is_the_difference_of_the_distributions():
    student, teacher = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
    divergence(student, teacher, 3.0).sum().backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))  # T^2 / T
    torch.testing.assert_close(student.grad, expected)


def test_the_divergence_of_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    assert torch.equal(divergence(student, teacher, 2.0), divergence(student.float(), teacher.float(), 2.0))


@pytest.mark.parametrize("excluded", [-math.inf, 0.5])
def test_classes_without_probability_add_nothing_to_the_divergence(excluded):
    """A class that the teacher excludes: the student does too, or gives it a logit."""
    student = tensor([[1.0, 2.0, excluded]], requires_grad=True)
    found = divergence(student, tensor([[1.0, 3.0, -math.inf]]), 2.0)
    found.sum().backward()
    q, p = softmax(student[0].tolist(), 2.0), softmax([1.0, 3.0, -math.inf], 2.0)
    expected = 4 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p[:2], q[:2], strict=True))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(student.grad, 2.0 * (tensor([q]) - tensor([p])))


def test_the_divergence_hides_no_nan_and_no_impossible_class():
    teacher = tensor([0.0, 1.0, -math.inf])
    assert divergence(tensor([0.0, math.nan, 0.0]), teacher, 2.0).isnan()
    assert divergence(tensor([0.0, 1.0, 0.0]), tensor([0.0, math.nan, 0.0]), 2.0).isnan()
    assert divergence(tensor([0.0, -math.inf, 0.0]), teacher, 2.0).item() == math.inf


def test_the_cross_entropy_of_several_labels():
    q, p = (1 / (1 + math.exp(-value / 2)) for value in (0.7, -1.1))
    expected = -4 * (p * math.log(q) + (1 - p) * math.log(1 - q))
    assert binary_cross_entropy(tensor([0.7]), tensor([-1.1]), 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert squared_error(tensor([3.0, 1.0]), tensor([1.0, 1.5])).tolist() == [4.0, 0.25]


def test_the_relative_error_is_of_each_row_without_padding():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    student[1, 2] = math.nan  # padding
    mask = tensor([[True, True, True], [True, True, False]])
    expected = [
        ((student[row, :count] - teacher[row, :count]) ** 2).sum() / (teacher[row, :count] ** 2).sum()
        for row, count in enumerate((3, 2))
    ]
    student.requires_grad_()
    found = relative_error(student, teacher, mask)
    torch.testing.assert_close(found, torch.stack(expected))
    found.sum().backward()
    assert student.grad.isfinite().all() and not student.grad[1, 2].any()


@pytest.mark.parametrize("count, others", [(6, 12), (12, 6), (4, 4), (5, 3), (1, 12), (24, 1)])
def test_layers_are_paired_at_equal_depth_and_the_last_with_the_last(count, others):
    pairs = layer_pairs(count, others)
    assert [layer for layer, _ in pairs] == list(range(1, count + 1)) and pairs[-1] == (count, others)
    paired = [other for _, other in pairs]
    assert paired == sorted(paired) and paired[0] >= 1
    assert all(abs(other - layer * others / count) <= 0.5 or other == 1 for layer, other in pairs)


def test_the_loss_of_hidden_states_is_the_mean_over_layers_and_rows_without_embeddings():
    student = [torch.full((2, 3, 4), value) for value in (9.0, 2.0, 1.0)]
    teacher = [torch.full((2, 3, 4), value) for value in (1.0, 5.0, 1.0, 5.0, 2.0)]
    # Layer 1 with 2, layer 2 with 4: (2 - 1)^2 / 1^2 and (1 - 2)^2 / 2^2.
    assert hidden_loss(student, teacher, None).item() == pytest.approx((1 + 0.25) / 2)
    with pytest.raises(ValueError, match=r"layer 1 have shape \(2, 3, 4\), those .* layer 1 \(2, 3, 5\)"):
        hidden_loss(student, [torch.ones(2, 3, 5)] * 3, None)
