"""RxC blocks: rectangles of weights that are pruned together."""

from dataclasses import dataclass

import torch

from ..numerics import divide
from .base import Pattern, pairwise_sum, register_pattern


@register_pattern("block")
@dataclass(frozen=True)
class Block(Pattern):
    """A unit is `height` outputs by `width` inputs; its score is the mean of its weights' scores.

    Args:
        height: outputs, at least 1.
        width: inputs, at least 1.

    Example:
        >>> Block(2, 1).pool(torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]]))
        tensor([[[2., 4.]]])

    Reference: Narang et al., "Block-Sparse Recurrent Neural Networks", 2017.
    """

    height: int
    width: int

    syntax = r"(\d+)x(\d+)"
    example = "4x1"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f'`pattern` "{self.height}x{self.width}" needs both sides at least 1, as in 4x1.')

    @property
    def deployment_note(self) -> str:
        return (
            f"Blocks of {self} weights (outputs x inputs) are zero. Runtimes with block-sparse kernels of that shape "
            "can skip them; the dense kernels of transformers multiply by them. No speed was measured."
        )

    def check(self, rows: int, columns: int) -> str | None:
        for side, size, name in ((self.height, rows, "output"), (self.width, columns, "input")):
            if size % side:
                return f'`pattern` "{self.height}x{self.width}" needs the {name} size divisible by {side}'
        return None

    def unit_rows(self, rows: int) -> int:
        return self.height

    def unit_columns(self, columns: int) -> int:
        return self.width

    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> tuple[int, ...]:
        return (shape_RPC[0] // self.height, shape_RPC[1], shape_RPC[2] // self.width)

    def pool(self, scores_RPC: torch.Tensor) -> torch.Tensor:
        rows, positions, columns = scores_RPC.shape
        count, columns = rows // self.height, columns // self.width
        by_row = pairwise_sum(scores_RPC.reshape(count, self.height, positions, -1), 1)
        return divide(pairwise_sum(by_row.view(count, positions, columns, self.width), 3), self.height * self.width)

    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> torch.Tensor:
        return keep_U.repeat_interleave(self.height, dim=0).repeat_interleave(self.width, dim=2)
