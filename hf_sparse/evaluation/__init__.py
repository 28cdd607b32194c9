"""Evaluation on held-out data: one metric for each kind of model."""

from .evaluate import evaluate_model, metric_for, reference_outputs
from .library import Metric, accuracy, load_metric_or_fallback


__all__ = [
    "Metric",
    "accuracy",
    "evaluate_model",
    "load_metric_or_fallback",
    "metric_for",
    "reference_outputs",
]
