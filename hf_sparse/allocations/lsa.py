"""LSA: blocks with a large least reconstruction error are pruned more.

Shapes: R rows, C inputs of a matrix; B inputs of a group of columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..requires import Requires
from ..statistics import GramMatrix
from .base import DenseLayer, LayerSize, MeasuringAllocation, register_allocation, spread_sparsities


ROWS = 1024
"""Rows of a matrix that are measured, at equal distances; their mean stands for all."""

COLUMNS = 128
"""B: inputs that are removed in turn, before those of the next group."""


@register_allocation("lsa")
@dataclass(frozen=True)
class LSA(MeasuringAllocation):
    """Prunes blocks with a large least reconstruction error more, within each layer's bounds.

    s_l = c + 2β·(E_l - min_k E_k) / (max_k E_k - min_k E_k), where E_l is the least squared error of the outputs,
    ‖XWᵀ - X(M⊙W)ᵀ‖², that removing half of the weights causes, as the mean over the matrices of the layer's block. A
    large one says that the error is spread over many weights, without a few that matter most. The constant c gives the
    mean its target.

    Args:
        beta: β, half the largest difference of two sparsities.

    Raises:
        ValueError: an option is out of range; `allocate`: a layer has not been measured.

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> sizes = {"units": 100, "rows": 10, "columns": 10}
        >>> layers = [LayerSize(name, **sizes, measured=error) for name, error in zip("abc", (1.0, 5.0, 3.0))]
        >>> {name: round(share, 4) for name, share in LSA(beta=0.1).allocate(0.5, layers).items()}
        {'a': 0.4, 'b': 0.6, 'c': 0.5}

    Reference: Yang et al., "LSA: Layer-wise Sparsity Allocation for Large Language Model Pruning Based on Minimal
    Linear Reconstruction Error", 2026, section 3.
    """

    beta: float = 0.08

    requires = Requires.DENSE_GRAM

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"`beta` is {self.beta}: it must be from 0 to 1, as in 0.08")

    def measure(self, layers: Sequence[DenseLayer]) -> list[float]:
        """Returns the mean error over the matrices of all layers, for each layer."""
        errors = [
            least_error(weight_RC, gram)
            for layer in layers
            for weight_RC, gram in zip(layer.weights, layer.inputs, strict=True)
            if isinstance(gram, GramMatrix)
        ]
        return [sum(errors) / len(errors)] * len(layers)

    def operations(self, rows: int, columns: int) -> float:
        # Errors of the later inputs by products, and of those in the group elementwise, one for each removed weight.
        return min(rows, ROWS) * columns * (columns / 2 + 8 * COLUMNS / 2)

    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        return spread_sparsities(self.measured(layers), self.beta, target, layers)


def least_error(weight_RC: torch.Tensor, gram: GramMatrix, share: float = 0.5, columns: int = COLUMNS) -> float:
    """Returns the squared error of the outputs when the weights that cause the least are removed one after the other.

    The error of a row w from which the inputs P are removed is the sum of w_i·G_ij·w_j over i and j in P, so that a
    further input k adds w_k²·G_kk + 2·w_k·Σ w_i·G_ik. The input that adds the least goes first, in each row by itself,
    until `share` of the group of `columns` is removed; then those of the next group.

    Args:
        weight_RC: any floating dtype.
        gram: of its inputs.
        share: of the weights of each row, from 0 to 1.
        columns: B, the size of a group.

    Example:
        >>> gram = GramMatrix(4)
        >>> gram.observe(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
        >>> least_error(torch.tensor([[2.0, 3.0, -2.0, 3.0]]), gram)  # the first and the third cancel
        0.0

    Reference: Yang et al., "LSA", 2026, algorithm 1.
    """
    rows, size = weight_RC.shape
    measured = min(rows, ROWS)
    gram_CC = gram.matrix()
    chosen = torch.arange(measured, device=weight_RC.device) * rows // measured
    weight = weight_RC.detach()[chosen].to(gram_CC.device, torch.float32)
    # What the removed inputs of a row add to the error of each input that remains.
    added = weight.square() * gram_CC.diagonal()
    total = torch.zeros((), dtype=torch.float64, device=gram_CC.device)
    for start in range(0, size, columns):
        stop = min(start + columns, size)
        inputs = slice(start, stop)
        w_RB, added_RB, gram_BB = weight[:, inputs], added[:, inputs], gram_CC[inputs, inputs]
        removed_RB = torch.zeros_like(w_RB)
        for _ in range(math.floor((stop - start) * share)):
            least, index = added_RB.min(1, keepdim=True)
            total += least.sum(dtype=torch.float64)
            value = w_RB.gather(1, index)
            removed_RB.scatter_(1, index, value)
            added_RB.addcmul_(w_RB * (2 * value), gram_BB[index[:, 0]])
            added_RB.scatter_(1, index, math.inf)
        later = slice(stop, size)
        added[:, later].addcmul_(weight[:, later], removed_RB @ gram_CC[inputs, later], value=2)
    return float(total) * rows / measured
