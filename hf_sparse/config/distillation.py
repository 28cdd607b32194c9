"""Options of distillation, which only training has: a teacher, and how its outputs enter the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from ..local_paths import published_name, published_values
from ..registry import format_options, format_value
from .base import option
from .validation import choice_error


SELF = "self"
"""The teacher that is a copy of the weights that a run starts from."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class DistillationOptions:
    """A teacher, and the weights of the terms of the loss, (1 - alpha) * task + alpha * logits + hidden * states."""

    distill_teacher: str | None = option(
        "Teacher to distill from: folder or Hub name of a dense model that is fine-tuned for the task, or self (a "
        "copy of the initial weights of the run). Default: no distillation."
    )
    distill_alpha: float | None = option(
        "Weight of the loss between the logits of student and teacher, from 0 to 1 (default 0.9); the task loss has "
        "the rest."
    )
    distill_temperature: float | None = option(
        "Temperature that divides both logits (default 2); the loss is multiplied by its square."
    )
    distill_hidden: float | None = option(
        "Weight of the loss between hidden states (SquareHead): squared distance to those of the teacher, relative to "
        "their squared norm, averaged over layers. Default: 0, none."
    )
    distill_teacher_dtype: str | None = option(
        "Data type of the teacher's weights: float32, bfloat16 or float16. Default: that of its files, or with self "
        "that of the model."
    )

    distillation_defaults: ClassVar[dict[str, object]] = {
        "distill_alpha": 0.9,
        "distill_temperature": 2.0,
        "distill_hidden": 0.0,
    }

    @property
    def distills(self) -> bool:
        """Whether there is a teacher."""
        return self.distill_teacher is not None


def published_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a config as they are written beside weights, without the folders of this machine.

    Example:
        >>> published_options({"distill_teacher": "/home/me/runs/dense", "target_sparsity": 0.8})
        {'distill_teacher': 'dense', 'target_sparsity': 0.8}
    """
    teacher = options.get("distill_teacher")
    published = published_values(options)
    return {**published, "distill_teacher": published_name(teacher)} if teacher else published


def distillation_errors(options: SimpleNamespace) -> Iterator[str]:
    """Yields the errors of the options of distillation, whose types have been checked."""
    alpha, temperature, hidden = options.distill_alpha, options.distill_temperature, options.distill_hidden
    if not 0 <= alpha <= 1:
        yield f"`distill_alpha` is {format_value(alpha)}: it must be a number from 0 to 1, as in 0.9."
    if not 0 < temperature < float("inf"):
        yield f"`distill_temperature` is {format_value(temperature)}: it must be a number above 0, as in 2.0."
    if not 0 <= hidden < float("inf"):
        yield f"`distill_hidden` is {format_value(hidden)}: it must be 0, for none, or a number above it, as in 1.0."
    if options.distill_teacher_dtype is not None:
        error = choice_error("distill_teacher_dtype", options.distill_teacher_dtype, DTYPES)
        if error:
            yield error
    if options.distill_teacher == "":
        yield '`distill_teacher` is "": name a folder or a model of the Hub, or self, or leave it out.'
    defaults = {**DistillationOptions.distillation_defaults, "distill_teacher_dtype": None}
    if options.distill_teacher is None:
        given = [name for name, default in defaults.items() if getattr(options, name) != default]
        if given:
            yield (
                f"{format_options(given)} need a teacher: add `distill_teacher`, as in "
                '`distill_teacher="path/to/dense"`.'
            )
    elif alpha == 0 and hidden == 0:
        yield (
            "`distill_alpha` and `distill_hidden` are 0, so that nothing is learned from `distill_teacher`: raise one "
            "of them, as in `distill_alpha=0.9`, or leave `distill_teacher` out."
        )
