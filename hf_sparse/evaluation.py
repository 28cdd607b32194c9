"""What a model is worth on data that it was not calibrated with: perplexity, or accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .calibration.batches import call, is_causal, on_device, with_labels
from .distributed import get_communicator, input_device
from .model.evaluation_mode import evaluation_mode


def evaluate_model(model: nn.Module, batches: Sequence[Any]) -> dict[str, float]:
    """Perplexity = exp(mean loss of a token) of causal language models, accuracy of sequence classifiers. Padding does
    not count. Of several processes each takes a share of the batches.

    Args:
        batches: mappings of keyword arguments; for classifiers with `labels`.

    Returns: `loss`, `perplexity` and `tokens`, or `accuracy` and `samples`.

    Raises:
        ValueError: another kind of model, or batches without labels.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))
        >>> model.classifier.bias.data[1] = 9.0  # it always answers 1
        >>> evaluate_model(model, [{"input_ids": torch.tensor([[2], [3]]), "labels": torch.tensor([1, 0])}])
        {'accuracy': 0.5, 'samples': 2}
    """
    measure = measure_of(model)
    communicator = get_communicator()
    total = torch.zeros(2, dtype=torch.float64)
    error = None
    with torch.no_grad(), evaluation_mode(model):
        try:
            for batch in batches[communicator.rank :: communicator.world_size]:
                total += measure(model, on_device(batch, input_device(model)))
        except ValueError as problem:
            error = problem
    communicator.raise_together(error)
    communicator.all_reduce(total)
    value, count = total.tolist()
    if not count:
        raise ValueError("there is nothing to evaluate on: the batches are empty.")
    if measure is _right_answers:
        return {"accuracy": value / count, "samples": int(count)}
    loss = value / count
    # exp overflows past 709.
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": int(count)}


def measure_of(model: nn.Module) -> Callable[[nn.Module, Any], torch.Tensor]:
    """What is measured of a batch: a sum, and how many it is of.

    Raises:
        ValueError: nothing is known to measure.
    """
    if is_causal(model):
        return _losses_of_tokens
    config = getattr(model, "config", None)
    regresses = getattr(config, "problem_type", None) not in (None, "single_label_classification")
    if type(model).__name__.endswith("ForSequenceClassification") and config.num_labels > 1 and not regresses:
        return _right_answers
    raise ValueError(
        f"{type(model).__name__} cannot be evaluated: perplexity is of causal language models, accuracy of "
        "classifiers with one label. Leave eval out, and measure the result with your own metric."
    )


def _losses_of_tokens(model: nn.Module, batch: Any) -> torch.Tensor:
    """The sum of the losses of all tokens but the first of each row. Row by row, as logits are large."""
    labels = with_labels(model, batch)["labels"][:, 1:]
    logits = call(model, {name: value for name, value in batch.items() if name != "labels"}).logits
    loss = torch.zeros((), dtype=torch.float64)
    for row, expected in zip(logits[:, :-1], labels.to(logits.device), strict=True):
        loss += float(nn.functional.cross_entropy(row.float(), expected, ignore_index=-100, reduction="sum"))
    return torch.stack([loss, (labels != -100).sum().cpu().double()])


def _right_answers(model: nn.Module, batch: Any) -> torch.Tensor:
    if "labels" not in batch:
        raise ValueError("accuracy needs labels: name the label_column of the data.")
    logits = call(model, {name: value for name, value in batch.items() if name != "labels"}).logits
    right = logits.argmax(-1) == batch["labels"].to(logits.device)
    return torch.tensor([float(right.sum()), float(len(right))], dtype=torch.float64)
