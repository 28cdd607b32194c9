"""Training the biases alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .base import Tuning, register_tune
from .parameters import bias_parameters, head_parameters, norm_parameters


@register_tune("biases")
@dataclass(frozen=True)
class Biases(Tuning):
    """Trains the biases, those of normalization modules among them.

    Args:
        train_norms: whether the scales of normalization modules are trained too.
        train_head: whether the task head is trained too; the output embeddings of a language model never are.

    Reference: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, section 3.
    """

    train_norms: bool = False
    train_head: bool = True

    def trained_parameters(self, model: nn.Module) -> set[str]:
        names = bias_parameters(model)
        names |= norm_parameters(model) if self.train_norms else set()
        return names | (head_parameters(model) if self.train_head else set())
