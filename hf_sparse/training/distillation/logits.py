"""The loss between the logits of a student and those of its teacher, by the kind of task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from .terms import binary_cross_entropy, divergence, squared_error


IGNORED = -100
"""The label of positions that no loss of transformers counts."""
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
SINGLE_LABEL = "single_label_classification"


@dataclass(frozen=True)
class ItemLoss:
    """A loss summed over the items that count: rows, tokens or labels.

    Args:
        total: sum, a scalar.
        count: number of the items, a scalar tensor or a number.
    """

    total: Tensor
    count: Tensor | int

    @property
    def mean(self) -> Tensor:
        """Mean over the items, 0 without any."""
        count = self.count
        return self.total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


@dataclass(frozen=True)
class LogitsLoss:
    """Compares the logits of a student with those of its teacher as the task demands: by their distributions over
    classes or tokens, by the probability of each of several labels, or by the predicted numbers.

    Args:
        temperature: of both.
        shifts: whether the logits of a token predict the next one, as in causal language models.
        problem_type: of the config of a classifier. None: told by the labels, as the models do.
    """

    temperature: float
    shifts: bool = False
    problem_type: str | None = None

    def __call__(self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Mapping[str, Any]) -> ItemLoss:
        """Returns the loss of one batch.

        Args:
            student, teacher: outputs of the models.
            inputs: of the student, with the labels, which say which positions count.

        Raises:
            ValueError: the models give no logits, or logits of different shapes, or the labels do not fit them.
        """
        if "start_logits" in student:
            return self._spans(student, teacher, inputs.get("attention_mask"))
        found, expected = _logits(student, teacher, "logits")
        labels = inputs.get("labels")
        if found.ndim == 2:
            return self._rows(found, expected, labels)
        mask = self._token_mask(found, inputs)
        losses = divergence(found, expected, self.temperature)
        if mask is None:
            return ItemLoss(losses.sum(), losses.numel())
        return ItemLoss(losses.masked_fill(~mask, 0.0).sum(), mask.sum())

    def _rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> ItemLoss:
        """One prediction for each row: classification or regression."""
        kind = self.problem_type or _problem_type(student, labels)
        if kind == REGRESSION:
            losses = squared_error(student, teacher)
        elif kind == MULTI_LABEL:
            losses = binary_cross_entropy(student, teacher, self.temperature)
        else:
            losses = divergence(student, teacher, self.temperature)
            if labels is not None and labels.numel() == len(losses):
                mask = labels.reshape(-1) != IGNORED
                return ItemLoss(losses.masked_fill(~mask, 0.0).sum(), mask.sum())
        return ItemLoss(losses.sum(), losses.numel())

    def _spans(self, student: Mapping[str, Any], teacher: Mapping[str, Any], mask: Tensor | None) -> ItemLoss:
        """Question answering: distributions of start and end over the tokens that are not padding. A row is an item,
        with the mean of both."""
        losses = []
        for name in ("start_logits", "end_logits"):
            found, expected = _logits(student, teacher, name)
            if mask is not None and mask.shape == found.shape:
                padding = mask == 0
                found, expected = (logits.float().masked_fill(padding, -1e9) for logits in (found, expected))
            losses.append(divergence(found, expected, self.temperature))
        return ItemLoss((losses[0] + losses[1]).sum() / 2, len(losses[0]))

    def _token_mask(self, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Returns which tokens count, (rows, tokens): those with a label, or without labels those that are no
        padding."""
        labels, places = inputs.get("labels"), logits.shape[:-1]
        if self.shifts and inputs.get("shift_labels") is not None:
            mask = inputs["shift_labels"] != IGNORED
        elif labels is not None:
            mask = labels != IGNORED
            if self.shifts:
                mask = functional.pad(mask[..., 1:], (0, 1), value=False)
        elif inputs.get("attention_mask") is not None:
            mask = inputs["attention_mask"] != 0
        else:
            return None
        if mask.shape != places:
            raise ValueError(
                f"`distill_alpha` compares logits, of shape {tuple(logits.shape)}, where labels say what counts, but "
                f"these are of shape {tuple(mask.shape)}: set `distill_alpha=0`, and `distill_hidden`, which needs no "
                "labels."
            )
        return mask.to(logits.device)


def _problem_type(logits: Tensor, labels: Tensor | None) -> str:
    """Returns the kind of classification as models of transformers find it where their config does not say."""
    if logits.shape[-1] == 1:
        return REGRESSION
    is_integer = labels is None or not labels.is_floating_point()
    return SINGLE_LABEL if is_integer else MULTI_LABEL


def _logits(student: Mapping[str, Any], teacher: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Returns the logits of both models on the device of the student."""
    for outputs, which in ((student, "student"), (teacher, "teacher")):
        if not isinstance(outputs.get(name), Tensor):
            raise ValueError(
                f"`distill_alpha` compares {name}, which the outputs of the {which} lack: set `distill_alpha=0`, or "
                "leave out what keeps the model from giving them, such as `use_liger_kernel`."
            )
    found, expected = student[name], teacher[name].to(student[name].device)
    if found.shape != expected.shape:
        raise ValueError(
            f"`distill_alpha` compares {name}, but those of the student have shape {tuple(found.shape)}, those of the "
            f"teacher {tuple(expected.shape)}: use a teacher of the same task with the same labels and vocabulary, or "
            "`distill_alpha=0`."
        )
    return found, expected
