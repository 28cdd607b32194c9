"""Accuracy of models that classify each token."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .base import ModelMetric, config_value, has_head, logits_of
from .classification import check_class_numbers


class TokenAccuracy(ModelMetric):
    """Share of tokens whose largest logit is that of their label; tokens with label -100 do not count."""

    name: ClassVar[str] = "accuracy"
    models: ClassVar[str] = "token classifiers"
    columns: ClassVar[int] = 2  # correct tokens, tokens with labels
    labels: ClassVar[tuple[str, ...]] = ("labels",)

    def fits(self, model: nn.Module) -> bool:
        return has_head(model, "ForTokenClassification")

    def check(self, model: nn.Module, batch: Any) -> None:
        super().check(model, batch)
        labels = batch["labels"]
        check_class_numbers(labels[labels != -100], config_value(model, "num_labels"))

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        predictions = logits_of(model, batch).argmax(-1)
        labels = batch["labels"].to(predictions.device)
        return torch.stack([(predictions == labels).sum(-1), (labels != -100).sum(-1)], dim=-1)

    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        correct, count = rows.sum(axis=0).tolist()
        if not count:
            raise ValueError("there is nothing to evaluate on: all labels are -100.")
        return {"accuracy": correct / count, "tokens": int(count)}
