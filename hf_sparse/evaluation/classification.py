"""Accuracy of classifiers with one label for each input."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .base import ModelMetric, config_value, has_head, logits_of
from .library import accuracy, load_metric_or_fallback


CLASSIFIER_HEADS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)


class ClassAccuracy(ModelMetric):
    """Share of inputs whose largest logit is that of their label."""

    name: ClassVar[str] = "accuracy"
    models: ClassVar[str] = "classifiers"
    columns: ClassVar[int] = 2  # prediction, label
    labels: ClassVar[tuple[str, ...]] = ("labels",)

    def fits(self, model: nn.Module) -> bool:
        kinds = (None, "single_label_classification")
        is_single = config_value(model, "problem_type") in kinds and config_value(model, "num_labels", 0) > 1
        return has_head(model, *CLASSIFIER_HEADS) and is_single

    def check(self, model: nn.Module, batch: Any) -> None:
        super().check(model, batch)
        labels, num_labels = batch["labels"], config_value(model, "num_labels")
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}: accuracy needs one class number for each "
                'input. A model with several labels has problem_type="multi_label_classification" in its config.'
            )
        check_class_numbers(labels, num_labels)

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        predictions = logits_of(model, batch).argmax(-1)
        return torch.stack([predictions, batch["labels"].to(predictions.device)], dim=-1)

    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        predictions, references = rows.astype(np.int64).T.tolist()
        metric = load_metric_or_fallback(("accuracy",), accuracy)
        value = metric(predictions=predictions, references=references)["accuracy"]
        return {"accuracy": float(value), "samples": len(rows)}


def check_class_numbers(labels: torch.Tensor, num_labels: int) -> None:
    """Raises a ValueError if a label is not a class number of the model."""
    wrong = labels[(labels < 0) | (labels >= num_labels)]
    if len(wrong):
        raise ValueError(f"a label is {int(wrong[0])}: it must be from 0 to {num_labels - 1}.")
