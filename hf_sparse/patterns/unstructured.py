"""Unstructured: every weight is a unit."""

from dataclasses import dataclass

import torch

from .base import Pattern, register_pattern


@register_pattern("unstructured")
@dataclass(frozen=True)
class Unstructured(Pattern):
    """A unit is one weight.

    Example:
        >>> Unstructured().unit_shape((2, 1, 3))
        (2, 1, 3)

    Reference: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """

    syntax = "unstructured"
    example = "unstructured"
    flat = True

    @property
    def deployment_note(self) -> str:
        return (
            "Single weights are zero, without any structure. Dense kernels multiply by them like by other weights: no "
            "speed-up is claimed, nor less memory. The zeros help where files are compressed, and in runtimes with "
            "kernels for unstructured sparsity."
        )

    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> tuple[int, ...]:
        return shape_RPC

    def pool(self, scores_RPC: torch.Tensor) -> torch.Tensor:
        return scores_RPC

    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> torch.Tensor:
        return keep_U
