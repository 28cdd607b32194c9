"""Measures a model on batches, by the metric of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibration.batches import to_device
from ..distributed import get_communicator, input_device, raise_on_all_ranks
from ..model.evaluation_mode import evaluation_mode
from .base import ModelMetric
from .classification import ClassAccuracy
from .embedding import EmbeddingCosine, embed
from .multi_label import MultiLabelF1
from .perplexity import CausalPerplexity, MaskedPerplexity, TargetPerplexity
from .question_answering import AnswerSpans
from .regression import Regression
from .token_classification import TokenAccuracy


METRICS: tuple[ModelMetric, ...] = (
    CausalPerplexity(),
    MaskedPerplexity(),
    TargetPerplexity(),
    ClassAccuracy(),
    MultiLabelF1(),
    Regression(),
    TokenAccuracy(),
    AnswerSpans(),
    EmbeddingCosine(),
)
"""A model is measured by the first that fits it."""


def evaluate_model(
    model: nn.Module, batches: Sequence[Any], reference: Sequence[torch.Tensor] | None = None
) -> dict[str, float]:
    """Measures a model by the metric of its kind.

    | models | values |
    |---|---|
    | causal language models | `loss`, `perplexity` exp(loss), `tokens`; each row's first token is not predicted |
    | masked language models | the same of the masked tokens |
    | encoder-decoder models | the same of the target texts |
    | classifiers | `accuracy`, `samples` |
    | classifiers with several labels | `f1` over all labels, `accuracy` of all labels of a sample, `samples` |
    | regression models | `pearsonr`, `spearmanr`, `mse`, `samples` |
    | token classifiers | `accuracy`, `tokens` |
    | question answering models | `exact_match` and `f1` of spans of tokens, from 0 to 1, `samples` |
    | models without a task head | `cosine` of the mean last hidden states with those of the dense model, `samples` |

    Padding does not count. Under several processes each evaluates a share of the batches, and all get the same result.

    Args:
        model: left in the mode (training or evaluation) that it was in.
        batches: dicts of keyword arguments, such as `evaluation_batches` makes; with `labels`, or `start_positions`
            and `end_positions`, where the metric needs them.
        reference: what `reference_outputs` returned for the dense model and the same batches.

    Raises:
        ValueError: if the model is of another kind, there are no batches, labels are missing or wrong, or the
            reference does not belong to the batches.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))
        >>> model.classifier.bias.data[1] = 9.0  # it always predicts class 1
        >>> evaluate_model(model, [{"input_ids": torch.tensor([[2], [3]]), "labels": torch.tensor([1, 0])}])
        {'accuracy': 0.5, 'samples': 2}
    """
    metric = metric_for(model)
    check_batches(model, batches)
    indices = _local_indices(batches)
    _check_reference(model, metric, reference, len(indices))
    rows = []
    with raise_on_all_ranks(Exception), torch.no_grad(), evaluation_mode(model):
        for number, index in enumerate(indices):
            batch = to_device(batches[index], input_device(model))
            measured = metric.measure(model, batch, None if reference is None else reference[number]).cpu().double()
            rows.append(torch.cat([torch.full((len(measured), 1), float(index)), measured], dim=1).flatten())
    gathered = get_communicator().all_gather(torch.cat(rows) if rows else torch.empty(0, dtype=torch.float64))
    table = torch.cat(gathered).reshape(-1, 1 + metric.columns).numpy()
    return metric.summarize(table[np.argsort(table[:, 0], kind="stable"), 1:])


def reference_outputs(model: nn.Module, batches: Sequence[Any]) -> list[torch.Tensor] | None:
    """Computes the embeddings of a dense model without a task head, with which `evaluate_model` compares those of the
    pruned model.

    Args:
        model: the dense model, left in the mode that it was in.
        batches: those that the pruned model will be evaluated on.

    Returns:
        The embeddings (B, H), float32 on the CPU, of each batch that this process evaluates; None for models whose
        metric needs no reference.

    Raises:
        ValueError: as `evaluate_model`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
        >>> model, batches = BertModel(BertConfig(vocab_size=8, **sizes)), [{"input_ids": torch.tensor([[2, 3]])}]
        >>> reference = reference_outputs(model, batches)
        >>> round(evaluate_model(model, batches, reference)["cosine"], 6)  # nothing was pruned
        1.0
    """
    if not metric_for(model).needs_reference:
        return None
    check_batches(model, batches)
    embeddings = []
    with raise_on_all_ranks(Exception), torch.no_grad(), evaluation_mode(model):
        for index in _local_indices(batches):
            embeddings.append(embed(model, to_device(batches[index], input_device(model))).cpu())
    return embeddings


def metric_for(model: nn.Module) -> ModelMetric:
    """Returns the metric of a model's kind, which the name of its class and its config say.

    Raises:
        ValueError: if there is none.
    """
    for metric in METRICS:
        if metric.fits(model):
            return metric
    kinds = ", ".join(f"{metric.name} of {metric.models}" for metric in METRICS)
    raise ValueError(
        f"{type(model).__name__} cannot be evaluated: the metrics are {kinds}. Leave eval out, and measure the result "
        "with your own metric."
    )


def check_batches(model: nn.Module, batches: Sequence[Any]) -> None:
    """Checks all batches before any is measured.

    Raises:
        ValueError: if there are none, or labels are missing or wrong.
    """
    if not batches:
        raise ValueError("there is nothing to evaluate on: the batches are empty.")
    metric = metric_for(model)
    for batch in batches:
        metric.check(model, batch)


def _local_indices(batches: Sequence[Any]) -> range:
    """Returns the indices of the batches that this rank evaluates."""
    communicator = get_communicator()
    return range(communicator.rank, len(batches), communicator.world_size)


def _check_reference(
    model: nn.Module, metric: ModelMetric, reference: Sequence[torch.Tensor] | None, expected: int
) -> None:
    name = type(model).__name__
    if not metric.needs_reference:
        if reference is not None:
            raise ValueError(f"{name} is not compared with a reference: leave it out, or pass `reference=None`.")
    elif reference is None:
        raise ValueError(
            f"{name} has no task head and is compared with the dense model: pass reference=reference_outputs(model, "
            "batches), computed before pruning."
        )
    elif len(reference) != expected:
        raise ValueError(
            f"the reference has {len(reference)} entries, but this process evaluates {expected} batches: compute it "
            "with reference_outputs from the same batches, on as many processes."
        )
