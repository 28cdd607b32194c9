"""N:M: of every M neighbours along the input dimension, N are kept."""

from dataclasses import dataclass

import torch

from .base import Pattern, register_pattern
from .n_of_m_kernel import keep_n_of_m
from .unstructured import Unstructured


@register_pattern("n_of_m")
@dataclass(frozen=True)
class NOfM(Pattern):
    """Keep N of every M: "2:4" keeps two weights of every four; elsewhere N may be the number pruned.

    A unit is one weight, and only the M-N lowest of each group may be pruned. Below the target sparsity, 1 - N/M, the
    lowest of those are pruned first; at the target every group holds exactly N.

    Args:
        keep: N, the weights of a group that are kept.
        of: M, the weights of a group.

    Example:
        >>> scores = torch.tensor([[[3.0, 1.0, 2.0, 4.0]]])
        >>> NOfM(2, 4).pool(scores)
        tensor([[[inf, 1., 2., inf]]])

    Reference: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021.
    """

    keep: int
    of: int

    syntax = r"(\d+):(\d+)"
    example = "2:4"

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of:
            raise ValueError(
                f'`pattern` "{self.keep}:{self.of}" keeps {self.keep} of every {self.of}: it needs 1 <= N < M, as in '
                "2:4."
            )

    @property
    def max_sparsity(self) -> float:
        return 1.0 - self.keep / self.of

    @property
    def unprotected(self) -> Unstructured:
        return Unstructured()

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(N, M): the N highest scores of every M adjacent inputs are kept."""
        return self.keep, self.of

    @property
    def implied_sparsity(self) -> float | None:
        return self.max_sparsity

    @property
    def deployment_note(self) -> str:
        zeros = f"Of every {self.of} weights along the input dimension at most {self.keep} are not zero."
        if (self.keep, self.of) == (2, 4):
            return (
                f"{zeros} GPUs with sparse tensor cores (NVIDIA Ampere and newer) have kernels for that, in torch "
                "through `torch.sparse.to_sparse_semi_structured`. As loaded above the weights are dense, and no "
                "speed was measured."
            )
        return (
            f"{zeros} Sparse tensor cores of GPUs support 2:4: check whether yours support {self}. No speed was "
            "measured."
        )

    def check(self, rows: int, columns: int) -> str | None:
        if columns % self.of:
            return f'`pattern` "{self.keep}:{self.of}" needs the input size divisible by {self.of}'
        return None

    def unit_columns(self, columns: int) -> int:
        return self.of

    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> tuple[int, ...]:
        return shape_RPC

    def pool(self, scores_RPC: torch.Tensor) -> torch.Tensor:
        scores = scores_RPC.contiguous()
        protected = keep_n_of_m(scores.view(-1, self.of), self.keep).view(scores.shape)
        # Unlike a fill, clamping leaves a nan as it is, for the ranking to refuse it.
        return torch.where(protected, scores.clamp(min=torch.inf), scores)

    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> torch.Tensor:
        return keep_U
