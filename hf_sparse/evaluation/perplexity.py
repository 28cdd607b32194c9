"""Perplexity of language models: causal, masked, and with an encoder and a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..calibration.batches import call_model, is_causal_lm
from ..calibration.masking import is_masked_lm
from .base import ModelMetric, config_value, has_head, logits_of


class Perplexity(ModelMetric):
    """exp(L), L the mean cross-entropy over all tokens that are predicted, of all rows together."""

    columns = 2  # sum of the losses of a row, number of its tokens

    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        total, count = rows.sum(axis=0)
        if not count:
            raise ValueError("there is nothing to evaluate on: the batches have no token to predict.")
        mean = float(total / count)
        # exp overflows beyond 709.
        return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": int(count)}


class CausalPerplexity(Perplexity):
    """Perplexity of the tokens but each row's first; padding does not count."""

    name: ClassVar[str] = "perplexity"
    models: ClassVar[str] = "causal language models"

    def fits(self, model: nn.Module) -> bool:
        reads_images = has_head(model, "ForConditionalGeneration") and not config_value(model, "is_encoder_decoder")
        return is_causal_lm(model) or reads_images

    def check(self, model: nn.Module, batch: Any) -> None:
        if not isinstance(batch, Mapping) or not {"labels", "input_ids"} & batch.keys():
            raise ValueError("perplexity needs token ids: pass batches that are dicts with input_ids or labels.")

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        labels = batch["labels" if "labels" in batch else "input_ids"][:, 1:].clone()
        mask = batch.get("attention_mask")
        if torch.is_tensor(mask) and mask.ndim == 2:
            # A first token after padding is predicted from padding.
            labels[~(mask[:, 1:].bool() & mask[:, :-1].bool())] = -100
        return token_losses(logits_of(model, batch)[:, :-1], labels)


class MaskedPerplexity(Perplexity):
    """Perplexity of the tokens that `mask_tokens` has masked."""

    name: ClassVar[str] = "perplexity of masked tokens"
    models: ClassVar[str] = "masked language models"
    labels: ClassVar[tuple[str, ...]] = ("labels",)
    label_remedy: ClassVar[str] = "make the batches with evaluation_batches, or mask them with mask_tokens"

    def fits(self, model: nn.Module) -> bool:
        return is_masked_lm(model)

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        return token_losses(logits_of(model, batch), batch["labels"])


class TargetPerplexity(Perplexity):
    """Perplexity of the target texts, given their sources."""

    name: ClassVar[str] = "perplexity of target texts"
    models: ClassVar[str] = "encoder-decoder models"
    labels: ClassVar[tuple[str, ...]] = ("labels",)

    def fits(self, model: nn.Module) -> bool:
        generates = has_head(model, "ForConditionalGeneration", "EncoderDecoderModel")
        return generates and bool(config_value(model, "is_encoder_decoder"))

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        return token_losses(call_model(model, batch).logits, batch["labels"])  # the decoder's inputs are the labels


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the cross-entropies of each row and its number of labels other than -100.

    Args:
        logits: (B, T, V). Rows are computed one by one, as their float32 copies are large.
        labels: (B, T).

    Example:
        >>> token_losses(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).exp()  # a loss of log 4, one token
        tensor([[4.0000, 2.7183]])
    """
    labels = labels.to(logits.device)
    losses = [
        nn.functional.cross_entropy(row.float(), row_labels, ignore_index=-100, reduction="sum")
        for row, row_labels in zip(logits, labels, strict=True)
    ]
    return torch.stack([torch.stack(losses), (labels != -100).sum(-1).float()], dim=-1)
