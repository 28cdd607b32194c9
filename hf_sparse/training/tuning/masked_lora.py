"""MaskLoRA: low-rank updates that leave zeros of the weights zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...model.layers import PrunableLayer
from .base import Tuning, register_tune
from .parameters import bias_parameters, head_parameters, norm_parameters


class LowRankUpdate(nn.Module):
    """(alpha / rank)·B A, in the layout of a weight.

    A starts uniform in ±1/sqrt(inputs) and B at zero, as in LoRA. Each expert of fused weights has its own A and B.

    Args:
        layer: the weight, with matrices of O outputs and I inputs (times kernel positions).
        rank: of B A; at most min(O, I) is used.
        alpha: numerator of the scale.
        generator: of the initial A.

    Attributes:
        A: (rank, I), or (experts, rank, I).
        B: (O, rank), or (experts, O, rank).
    """

    def __init__(self, layer: PrunableLayer, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        rows, positions, columns = layer.matrix_shape
        inputs = positions * columns
        used = min(rank, rows, inputs)
        experts = () if layer.expert_dim is None else (layer.num_matrices,)
        self.scale, self.shape = alpha / rank, layer.shape
        self.is_transposed = layer.row_dim > layer.column_dim
        bound = inputs**-0.5
        self.A = nn.Parameter(torch.empty(*experts, used, inputs).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(*experts, rows, used))

    def forward(self) -> torch.Tensor:
        product = (self.scale * self.B) @ self.A
        return (product.mT if self.is_transposed else product).reshape(self.shape)


@register_tune("masked_lora")
@dataclass(frozen=True)
class MaskedLora(Tuning):
    """W = W0 + M * (alpha / rank)·B A for each selected weight, with its mask M.

    Gradients: with G = M * dL/dW, dL/dB = (alpha / rank)·G Aᵀ and dL/dA = (alpha / rank)·Bᵀ G. The model itself holds
    W, so that there is nothing to merge.

    Args:
        rank: of B A.
        alpha: the scale is alpha / rank.
        train_norms: whether normalization modules are trained too.
        train_biases: whether biases are trained too.
        train_head: whether the task head is trained too; the output embeddings of a language model never are.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> layer = PrunableLayer("down.weight", "linear", (8, 6))
        >>> update = MaskedLora(rank=2).new_update(layer, torch.Generator().manual_seed(0))
        >>> {name: tuple(value.shape) for name, value in update.named_parameters()}, update().any().item()
        ({'A': (2, 6), 'B': (8, 2)}, False)

    Reference: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, section 3.
    """

    rank: int = 16
    alpha: float = 32.0
    train_norms: bool = True
    train_biases: bool = True
    train_head: bool = True

    updates_weights = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"`rank` is {self.rank}: it must be at least 1, as in 16")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"`alpha` is {self.alpha}: it must be above 0, as in 32")

    def trained_parameters(self, model: nn.Module) -> set[str]:
        names = norm_parameters(model) if self.train_norms else set()
        names |= bias_parameters(model) if self.train_biases else set()
        return names | (head_parameters(model) if self.train_head else set())

    def new_update(self, layer: PrunableLayer, generator: torch.Generator) -> nn.Module:
        return LowRankUpdate(layer, self.rank, self.alpha, generator)
