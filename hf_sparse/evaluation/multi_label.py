"""F1 of classifiers with any number of labels for each input."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .base import ModelMetric, config_value, has_head, logits_of
from .classification import CLASSIFIER_HEADS


class MultiLabelF1(ModelMetric):
    """F1 = 2 tp / (2 tp + fp + fn) over all labels of all inputs, and the share of inputs with all labels right.

    A label is predicted where its probability is above one half.
    """

    name: ClassVar[str] = "F1"
    models: ClassVar[str] = "classifiers with several labels"
    columns: ClassVar[int] = 4  # tp, fp, fn, all right
    labels: ClassVar[tuple[str, ...]] = ("labels",)

    def fits(self, model: nn.Module) -> bool:
        is_multi_label = config_value(model, "problem_type") == "multi_label_classification"
        return has_head(model, *CLASSIFIER_HEADS) and is_multi_label

    def check(self, model: nn.Module, batch: Any) -> None:
        super().check(model, batch)
        labels, num_labels = batch["labels"], config_value(model, "num_labels")
        if labels.ndim != 2 or labels.shape[1] != num_labels or bool(((labels != 0) & (labels != 1)).any()):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are not {num_labels} zeros or ones for each input: F1 needs "
                "for each label whether an input has it."
            )

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        predicted = logits_of(model, batch) > 0
        actual = batch["labels"].to(predicted.device).bool()
        counts = [(predicted & actual).sum(-1), (predicted & ~actual).sum(-1), (~predicted & actual).sum(-1)]
        return torch.stack([*counts, (predicted == actual).all(-1)], dim=-1)

    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        true_positives, false_positives, false_negatives, right = rows.sum(axis=0).tolist()
        denominator = 2 * true_positives + false_positives + false_negatives
        f1 = 2 * true_positives / denominator if denominator else 0.0
        return {"f1": f1, "accuracy": right / len(rows), "samples": len(rows)}
