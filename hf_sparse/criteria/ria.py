"""Relative importance and activations."""

from dataclasses import dataclass
from typing import Any

import torch

from ..requires import Requires
from .base import Criterion, register_criterion


_SMALLEST_SUM = 1e-30


@register_criterion("ria")
@dataclass(frozen=True)
class RelativeImportance(Criterion):
    """(|w_ij| / Σ_k |w_ik| + |w_ij| / Σ_k |w_kj|)·‖x_j‖₂^alpha, with the sums over the row and the column of a weight.

    A weight that is large for its row or its column is kept, so that no input and no output loses all its weights.
    One-shot pruning only: training does not observe inputs.

    Args:
        alpha: exponent of the norm of input feature j over all tokens of the calibration data; 0 or more.

    Example:
        >>> weight, norms = torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.tensor([4.0, 1.0])
        >>> ria = RelativeImportance()
        >>> ria.score(weight, ria.prepare_statistic(weight, norms))
        tensor([[1.5000, 1.5000],
                [2.0000, 0.7500]])

    Reference: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    2024, eq. 5.
    """

    alpha: float = 0.5

    requires = Requires.INPUT_NORMS
    default_scope = "layer"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"`alpha` is {self.alpha}: it must be 0 or more, as in 0.5")

    def prepare_statistic(self, weight_RC: torch.Tensor, norms_C: torch.Tensor) -> torch.Tensor:
        """Returns (R, C) (1 / Σ_k |w_ik| + 1 / Σ_k |w_kj|)·‖x_j‖^alpha, float32."""
        magnitudes = weight_RC.detach().float().abs()
        rows_R1, columns_C = (magnitudes.sum(dim, keepdim=dim == 1).clamp(min=_SMALLEST_SUM) for dim in (1, 0))
        return rows_R1.reciprocal().add(columns_C.reciprocal()).mul_(norms_C.float() ** self.alpha)

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        return weight.detach().float().abs() * statistic
