"""Evaluation on held-out data: perplexity of causal language models, accuracy of classifiers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .calibration.batches import call_model, is_causal_lm, to_device, with_labels
from .distributed import get_communicator, input_device
from .model.evaluation_mode import evaluation_mode


logger = logging.getLogger(__name__)

Metric = Callable[..., dict[str, float]]
"""A function of `predictions` and `references` that returns values by name, as `compute` of the evaluate library."""

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE")


def evaluate_model(model: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """Measures the perplexity of a causal language model, or the accuracy of a sequence classifier.

    Perplexity is exp(L), where L is the mean cross-entropy over all tokens but each row's first. Padding does not
    count. Under several processes each evaluates a share of the batches, and all get the same result.

    Args:
        model: left in the mode (training or evaluation) that it was in.
        batches: dicts of keyword arguments, such as `calibration_batches` makes; with `labels` for classifiers.

    Returns:
        `loss`, `perplexity` and `tokens`, or `accuracy` and `samples`.

    Raises:
        ValueError: if the model is of another kind, there are no batches, or a classifier's have no labels.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))
        >>> model.classifier.bias.data[1] = 9.0  # it always predicts class 1
        >>> evaluate_model(model, [{"input_ids": torch.tensor([[2], [3]]), "labels": torch.tensor([1, 0])}])
        {'accuracy': 0.5, 'samples': 2}
    """
    is_accuracy = metric_for(model) == "accuracy"
    communicator = get_communicator()
    totals = torch.zeros(2, dtype=torch.float64)
    error = None
    try:
        with torch.no_grad(), evaluation_mode(model):
            share = batches[communicator.rank :: communicator.world_size]
            local_batches = (to_device(batch, input_device(model)) for batch in share)
            totals += (_count_correct if is_accuracy else _sum_losses)(model, local_batches)
    except ValueError as problem:
        error = problem
    communicator.raise_together(error)
    communicator.all_reduce(totals)
    total, count = totals.tolist()
    if not count:
        raise ValueError("there is nothing to evaluate on: the batches are empty.")
    mean = total / count
    if is_accuracy:
        return {"accuracy": mean, "samples": int(count)}
    # exp overflows beyond 709.
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": int(count)}


def metric_for(model: nn.Module) -> str:
    """Returns what `evaluate_model` measures of a model: "perplexity" or "accuracy".

    Raises:
        ValueError: if it can measure neither.
    """
    if is_causal_lm(model):
        return "perplexity"
    config: Any = getattr(model, "config", None)
    has_one_label = getattr(config, "problem_type", None) in (None, "single_label_classification")
    if type(model).__name__.endswith("ForSequenceClassification") and config.num_labels > 1 and has_one_label:
        return "accuracy"
    raise ValueError(
        f"{type(model).__name__} cannot be evaluated: perplexity is of causal language models, accuracy of "
        "classifiers with one label. Leave eval out, and measure the result with your own metric."
    )


def _sum_losses(model: nn.Module, batches: Iterable[Any]) -> torch.Tensor:
    """Returns the sum of the tokens' losses and the number of tokens. Computed row by row, as logits are large."""
    totals = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        labels = with_labels(model, batch)["labels"][:, 1:]
        logits = _logits(model, batch)
        loss = 0.0
        for row, row_labels in zip(logits[:, :-1], labels.to(logits.device), strict=True):
            loss += float(nn.functional.cross_entropy(row.float(), row_labels, ignore_index=-100, reduction="sum"))
        totals += torch.tensor([loss, int((labels != -100).sum())], dtype=torch.float64)
    return totals


def _count_correct(model: nn.Module, batches: Iterable[Any]) -> torch.Tensor:
    """Returns the number of correct predictions and of rows. Counts can be summed over processes, accuracies not."""
    predictions: list[int] = []
    references: list[int] = []
    for batch in batches:
        if "labels" not in batch:
            raise ValueError("accuracy needs labels: name the label_column of the data.")
        predictions += _logits(model, batch).argmax(-1).tolist()
        references += batch["labels"].tolist()
    if not references:
        return torch.zeros(2, dtype=torch.float64)
    metric = load_metric_or_fallback(("accuracy",), accuracy)
    share = metric(predictions=predictions, references=references)["accuracy"]
    return torch.tensor([round(share * len(references)), len(references)], dtype=torch.float64)


def _logits(model: nn.Module, batch: Any) -> torch.Tensor:
    return call_model(model, {name: value for name, value in batch.items() if name != "labels"}).logits


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Returns the share of predictions that equal their references, 1/n sum [p_i = r_i].

    Example:
        >>> accuracy([1, 1, 0, 0], [1, 0, 0, 0])
        {'accuracy': 0.75}
    """
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def load_metric_or_fallback(name: tuple[str, ...], fallback: Metric, cache_dir: str | None = None) -> Metric:
    """Loads a metric of the evaluate library, or returns `fallback` where that is not possible.

    The library downloads metrics from the Hub, so the fallback is used offline, and where the library or what its
    metric imports is not installed.

    Args:
        name: arguments of `evaluate.load`, as in ("glue", "mrpc").
        fallback: computes the same values with the same names.
        cache_dir: where the library keeps its files.
    """
    shown = " ".join(name)
    # evaluate ignores HF_HUB_OFFLINE, and takes seconds to give up without a network.
    if any(os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE") for variable in _OFFLINE_VARIABLES):
        logger.info(f"offline mode: the metric {shown} is computed by {fallback.__module__}.")
        return fallback
    try:
        import evaluate

        return evaluate.load(*name, cache_dir=cache_dir).compute
    except (OSError, ImportError) as error:
        logger.warning(
            f"evaluate could not load the metric {shown} ({type(error).__name__}); it is computed by "
            f"{fallback.__module__} instead, with the same names."
        )
        return fallback
