"""Distances between the outputs of a student and of its teacher, each of one item: a row, a token or a label."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution over the last dimension, times temperature^2.

    T^2 * sum_c p_c * (log p_c - log q_c), p = softmax(teacher / T), q = softmax(student / T)

    Args:
        student, teacher: logits (..., classes), of any floating dtype; computed in float32.
        temperature: T, above 0.

    Returns: (...), float32.

    Example:
        >>> import torch
        >>> divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]), 2.0)
        tensor(0.)

    Reference: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    expected = functional.log_softmax(teacher.float() / temperature, dim=-1)
    found = functional.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


def binary_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each label with the teacher's probability of it, times temperature^2, where several labels can
    be true.

    -T^2 * (p * log q + (1 - p) * log(1 - q)), p = sigmoid(teacher / T), q = sigmoid(student / T)

    Args:
        student, teacher: logits of one shape; computed in float32.
        temperature: T, above 0.

    Returns: of that shape, float32.

    Example:
        >>> import torch
        >>> binary_cross_entropy(torch.tensor([0.0]), torch.tensor([0.0]), 1.0)
        tensor([0.6931])

    Reference: Yang et al., "Multi-Label Knowledge Distillation", 2023, section 3.
    """
    probabilities = (teacher.float() / temperature).sigmoid()
    return temperature**2 * functional.binary_cross_entropy_with_logits(
        student.float() / temperature, probabilities, reduction="none"
    )


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(student - teacher)^2 in float32, of the predictions of a regression.

    Example:
        >>> import torch
        >>> squared_error(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([4.])

    Reference: Ba & Caruana, "Do Deep Nets Really Need to be Deep?", 2014.
    """
    return functional.mse_loss(student.float(), teacher.float(), reduction="none")
