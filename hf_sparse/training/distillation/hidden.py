"""The loss between the hidden states of a student and those of its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def layer_pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Returns (student's layer, teacher's layer) for each layer of the student, counted from 1, at equal relative
    depth: the last one is paired with the last.

    Example:
        >>> layer_pairs(3, 6)
        [(1, 2), (2, 4), (3, 6)]
        >>> layer_pairs(4, 2)
        [(1, 1), (2, 1), (3, 2), (4, 2)]
    """
    pairs = []
    for layer in range(1, student_layers + 1):
        nearest = (2 * layer * teacher_layers + student_layers) // (2 * student_layers)
        pairs.append((layer, max(1, nearest)))
    return pairs


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 of the hidden states of one layer, for each row of the batch.

    Args:
        student, teacher: (rows, tokens, size), or without tokens or with further dimensions; computed in float32.
        mask: (rows, tokens), True where a token counts. None: all count.

    Returns: (rows,), float32.

    Example:
        >>> relative_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), None)
        tensor([2.])

    Reference: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023
    (SquareHead; there one ratio for the whole batch).
    """
    return _RelativeError.apply(student, teacher, mask)


class _RelativeError(torch.autograd.Function):
    """Keeps the hidden states of both models, which are there anyway, in place of their difference in float32."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        squares = _masked(teacher.float(), mask).flatten(1).square().sum(1)
        squares = squares.clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(student, teacher, mask, squares)
        return _masked(student.float() - teacher, mask).flatten(1).square().sum(1) / squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, mask, squares = ctx.saved_tensors
        factor = (2 * outer / squares).view(-1, *[1] * (student.ndim - 1))
        return (_masked(student.float() - teacher, mask) * factor).to(student.dtype), None, None


def _masked(states: Tensor, mask: Tensor | None) -> Tensor:
    return states if mask is None else states.masked_fill(~mask[..., None], 0.0)


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean of `relative_error` over layers and rows.

    Args:
        student, teacher: hidden states, the embeddings first, which do not count.
        mask: (rows, tokens), see `relative_error`; it counts where the states are of tokens. Of multiple choice
            (rows, choices, tokens), with states of (rows * choices, tokens, size).

    Raises:
        ValueError: the hidden states differ in size.
    """
    if mask is not None and mask.ndim == 3:
        mask = mask.flatten(0, 1)
    errors = []
    for layer, other in layer_pairs(len(student) - 1, len(teacher) - 1):
        found, expected = student[layer], teacher[other].to(student[layer].device)
        if found.shape != expected.shape:
            raise ValueError(
                f"`distill_hidden` compares hidden states, but those of the student's layer {layer} have shape "
                f"{tuple(found.shape)}, those of the teacher's layer {other} {tuple(expected.shape)}: use a teacher "
                "of the same hidden size, or `distill_hidden=0`."
            )
        counts = mask is not None and found.ndim == 3 and mask.shape == found.shape[:2]
        errors.append(relative_error(found, expected, mask if counts else None).mean())
    return torch.stack(errors).mean()
