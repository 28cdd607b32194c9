"""Training the normalization alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .base import Tuning, register_tune
from .parameters import head_parameters, norm_parameters


@register_tune("norms")
@dataclass(frozen=True)
class Norms(Tuning):
    """Trains the scales and shifts of normalization modules.

    Args:
        train_head: whether the task head is trained too; the output embeddings of a language model never are.

    Reference: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, section 3.
    """

    train_head: bool = True

    def trained_parameters(self, model: nn.Module) -> set[str]:
        return norm_parameters(model) | (head_parameters(model) if self.train_head else set())
