"""Gradual pruning."""

from dataclasses import dataclass

from .base import DEFAULT_ALGORITHM, Algorithm, register_algorithm


@register_algorithm(DEFAULT_ALGORITHM)
@dataclass(frozen=True)
class Gradual(Algorithm):
    """Prunes the lowest weights by the criterion at each prune step; a pruned weight remains zero.

    Reference: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
    2017.
    """
