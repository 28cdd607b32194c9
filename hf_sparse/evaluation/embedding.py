"""Agreement of embeddings with those of the dense model, for models without a task head."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..calibration.batches import call_model, mask_for_inputs, token_masks
from .base import ModelMetric, config_value, has_no_head


class EmbeddingCosine(ModelMetric):
    """Mean cosine similarity of the embeddings with those of the dense model: 1 if no direction has changed.

    An embedding is the mean of the last hidden states over the tokens of an input, or the patches of an image; padding
    does not count.
    """

    name: ClassVar[str] = "cosine similarity to the dense model"
    models: ClassVar[str] = "models without a task head"
    columns: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = True

    def fits(self, model: nn.Module) -> bool:
        return has_no_head(model)

    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        embeddings = embed(model, batch).cpu()
        if reference is None or reference.shape != embeddings.shape:
            found = None if reference is None else tuple(reference.shape)
            raise ValueError(
                f"a reference of shape {found} does not belong to the embeddings {tuple(embeddings.shape)} of its "
                "batch: compute it with reference_outputs from the same batches."
            )
        return nn.functional.cosine_similarity(embeddings.double(), reference.double(), dim=-1)[:, None]

    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        return {"cosine": float(rows.mean()), "samples": len(rows)}


def embed(model: nn.Module, batch: Any) -> torch.Tensor:
    """Returns the embeddings (B, H) of a batch, float32.

    Raises:
        ValueError: if the model has no hidden states in its outputs.
    """
    outputs = call_model(model, batch)
    hidden = outputs if torch.is_tensor(outputs) else getattr(outputs, "last_hidden_state", None)
    if not torch.is_tensor(hidden) or hidden.ndim < 2:
        raise ValueError(
            f"{type(model).__name__} cannot be evaluated: it has no task head and its outputs no last_hidden_state. "
            "Leave eval out, and measure the result with your own metric."
        )
    hidden = hidden.float()
    if hidden.ndim == 4:  # channels of images come before the positions
        return hidden.mean((-2, -1))
    hidden = hidden.flatten(1, -2) if hidden.ndim > 2 else hidden[:, None]
    mask = mask_for_inputs(token_masks(batch, bool(config_value(model, "is_encoder_decoder"))), hidden)
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
