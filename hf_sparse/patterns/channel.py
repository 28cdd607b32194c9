"""Whole output rows ("channel", or "channel:out") and whole input columns ("channel:in")."""

from dataclasses import dataclass

import torch

from ..numerics import divide
from .base import Pattern, pairwise_sum, register_pattern


_NOTE = (
    "Whole {} are zero. They could be removed to make a smaller dense model; here they are still stored and computed, "
    "so size and speed are those of the dense model."
)


@register_pattern("channel")
@dataclass(frozen=True)
class Channel(Pattern):
    """A unit is one output: a row of a matrix, a filter of a convolution. Its score is the mean over its weights.

    Example:
        >>> Channel().pool(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]]))
        tensor([2., 6.])

    Reference: Li et al., "Pruning Filters for Efficient ConvNets", 2017.
    """

    syntax = "channel|channel:out"
    example = "channel"
    has_rows = False

    @property
    def deployment_note(self) -> str:
        return _NOTE.format("output rows")

    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> tuple[int, ...]:
        return shape_RPC[:1]

    def pool(self, scores_RPC: torch.Tensor) -> torch.Tensor:
        return divide(pairwise_sum(scores_RPC.flatten(1), 1), scores_RPC[0].numel())

    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> torch.Tensor:
        return keep_U[:, None, None].expand(shape_RPC)


@register_pattern("channel_in")
@dataclass(frozen=True)
class ChannelIn(Pattern):
    """A unit is one input: a column of a matrix, an input channel of a convolution, of each expert.

    Example:
        >>> ChannelIn().pool(torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]]))
        tensor([[3., 5.]])

    Reference: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017.
    """

    syntax = "channel:in"
    example = "channel:in"
    has_rows = False

    @property
    def deployment_note(self) -> str:
        return _NOTE.format("input columns")

    def unit_rows(self, rows: int) -> int:
        return rows

    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> tuple[int, ...]:
        return (1, shape_RPC[2])

    def pool(self, scores_RPC: torch.Tensor) -> torch.Tensor:
        rows, positions, _ = scores_RPC.shape
        return divide(pairwise_sum(scores_RPC.flatten(0, 1), 0)[None], rows * positions)

    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> torch.Tensor:
        return keep_U[:, None, :].expand(shape_RPC)
