"""Correlation and squared error of models that predict numbers."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .base import ModelMetric, config_value, has_head, logits_of
from .classification import CLASSIFIER_HEADS


class Regression(ModelMetric):
    """Pearson correlation of predictions and labels, Spearman correlation, the same of their ranks, and mean squared
    error; means over the outputs of the model.

    A correlation is 0 where all predictions or all labels are equal.
    """

    name: ClassVar[str] = "correlation"
    models: ClassVar[str] = "regression models"
    columns: ClassVar[int] = 3  # prediction, label, number of the output
    labels: ClassVar[tuple[str, ...]] = ("labels",)

    def fits(self, model: nn.Module) -> bool:
        problem_type = config_value(model, "problem_type")
        is_regression = problem_type == "regression" or (
            problem_type is None and config_value(model, "num_labels") == 1
        )
        return has_head(model, *CLASSIFIER_HEADS) and is_regression

    def check(self, model: nn.Module, batch: Any) -> None:
        super().check(model, batch)
        labels, num_labels = batch["labels"], config_value(model, "num_labels")
        shape = (*labels.shape[:1], *([num_labels] if num_labels > 1 else []))
        if labels.shape not in (shape, (*shape, 1)) or not bool(labels.isfinite().all()):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are not {num_labels} finite numbers for each input, which the "
                "correlation needs."
            )

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        predictions = logits_of(model, batch).float()
        outputs = torch.arange(predictions.shape[-1], device=predictions.device).expand(predictions.shape)
        labels = batch["labels"].to(predictions).reshape(predictions.shape)
        return torch.stack([values.flatten() for values in (predictions, labels, outputs)], dim=-1)

    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        by_output = [rows[rows[:, 2] == output, :2].T for output in np.unique(rows[:, 2])]
        return {
            "pearsonr": float(np.mean([correlation(*values) for values in by_output])),
            "spearmanr": float(np.mean([correlation(*map(ranks, values)) for values in by_output])),
            "mse": float(np.mean((rows[:, 0] - rows[:, 1]) ** 2)),
            "samples": len(rows) // len(by_output),
        }


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the Pearson correlation, sum x'y' / sqrt(sum x'^2 sum y'^2) with x' = x - mean(x); 0 if a sum is 0.

    Example:
        >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        1.0
    """
    x, y = x - x.mean(), y - y.mean()
    norms = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norms) if norms else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value from 1 on; equal values have the mean of their ranks.

    Example:
        >>> ranks(np.array([5.0, 2.0, 5.0]))
        array([2.5, 1. , 2.5])
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
