"""Distances between the outputs of a student and of its teacher, each of one item: a row, a token or a label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


# Logits of which the divergence is computed at once.
_MAX_VALUES = 2**24


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution over the last dimension, times temperature^2.

    T^2 * sum_c p_c * (log p_c - log q_c), p = softmax(teacher / T), q = softmax(student / T)

    A class that the teacher gives the probability 0 (a logit of -inf) adds 0, whatever the student gives it.

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
    return _Divergence.apply(student, teacher, temperature)


class _Divergence(torch.autograd.Function):
    """Computes the gradient with the value, some rows at a time: for large vocabularies the graph of the formula would
    hold several times as much memory as the logits in float32."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        classes = student.shape[-1]
        rows, others = student.reshape(-1, classes), teacher.reshape(-1, classes)
        values = torch.empty(len(rows), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(rows)
        size = max(1, _MAX_VALUES // classes)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            log_p = functional.log_softmax(others[part].float() / temperature, dim=-1)
            log_q = functional.log_softmax(rows[part].float() / temperature, dim=-1)
            p = log_p.exp()
            values[part] = torch.linalg.vecdot(p, _zero_without(p, log_p.sub_(log_q)))
            gradient[part] = log_q.exp_().sub_(p).mul_(temperature)
        ctx.save_for_backward(gradient.view(student.shape))
        return values.mul_(temperature**2).view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[..., None].to(gradient.dtype), None, None


def _zero_without(probabilities: Tensor, values: Tensor) -> Tensor:
    """Returns the values, with 0 where the probability is 0, also in place of NaN and infinity."""
    # torch.where(probabilities > 0, values, 0) in one pass.
    return torch.ops.aten.threshold_backward(values, probabilities, 0)


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
