"""Exact match and F1 of the answers that question answering models extract."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..calibration.batches import call_model
from .base import ModelMetric, has_head


class AnswerSpans(ModelMetric):
    """Agreement of the predicted span of tokens with the labelled one: share of equal spans, and F1 of their tokens.

    The prediction is the span s..e, s <= e, with the largest sum of start logit s and end logit e; padding is in none.
    F1 = 2 c / (p + l), where c tokens are common to the predicted p and the labelled l. Spans of tokens are compared,
    so that the values differ from those of SQuAD, which compares normalized texts with all reference answers.
    """

    name: ClassVar[str] = "exact match of answers"
    models: ClassVar[str] = "question answering models"
    columns: ClassVar[int] = 2  # exact match, F1
    labels: ClassVar[tuple[str, ...]] = ("start_positions", "end_positions")
    label_remedy: ClassVar[str] = "name the `label_column` of the data, which holds answers as in SQuAD"

    def fits(self, model: nn.Module) -> bool:
        return has_head(model, "ForQuestionAnswering")

    def check(self, model: nn.Module, batch: Any) -> None:
        super().check(model, batch)
        start, end = (batch[name] for name in self.labels)
        length = batch["input_ids"].shape[1]
        if bool(((start < 0) | (end < start) | (end >= length)).any()):
            raise ValueError(f"start_positions and end_positions must be spans within the {length} tokens of a row.")

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        outputs = call_model(model, {name: value for name, value in batch.items() if name not in self.labels})
        start, end = best_spans(outputs.start_logits, outputs.end_logits, batch.get("attention_mask"))
        first, last = (batch[name].to(start.device) for name in self.labels)
        common = (torch.minimum(end, last) - torch.maximum(start, first) + 1).clamp(min=0)
        f1 = 2 * common / ((end - start + 1) + (last - first + 1))
        return torch.stack([((start == first) & (end == last)).float(), f1], dim=-1)

    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        exact, f1 = rows.mean(axis=0).tolist()
        return {"exact_match": exact, "f1": f1, "samples": len(rows)}


def best_spans(
    start_logits: torch.Tensor, end_logits: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the first and last positions (B,) of the best spans.

    Args:
        start_logits, end_logits: (B, T).
        mask: (B, T), 0 at padding; None if there is none.

    Example:
        >>> best_spans(torch.tensor([[0.0, 5.0, 9.0]]), torch.tensor([[8.0, 6.0, 1.0]]), None)
        (tensor([1]), tensor([1]))
    """
    start_logits, end_logits = start_logits.float(), end_logits.float()
    if mask is not None:
        is_padding = ~mask.to(start_logits.device).bool()
        start_logits = start_logits.masked_fill(is_padding, -torch.inf)
        end_logits = end_logits.masked_fill(is_padding, -torch.inf)
    best_start, start_of_end = start_logits.cummax(-1)
    end = (best_start + end_logits).argmax(-1)
    return start_of_end.gather(-1, end[:, None])[:, 0], end
