"""Unstructured: every weight is a unit."""

from dataclasses import dataclass

from .base import Pattern, register_pattern


@register_pattern("unstructured")
@dataclass(frozen=True)
class Unstructured(Pattern):
    """A unit is one weight.

    Example:
        >>> Unstructured().unit_shape((2, 1, 3))
        (2, 1, 3)
    """

    syntax = "unstructured"
    example = "unstructured"
    flat = True

    def unit_shape(self, shape_RPC):
        return shape_RPC

    def pool(self, scores_RPC):
        return scores_RPC

    def expand(self, keep_U, shape_RPC):
        return keep_U
