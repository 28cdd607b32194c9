"""Patterns: the pruning granularity. One file each."""

from . import block, channel, coupled, n_of_m, unstructured
from .base import PATTERNS, Pattern, get_pattern, register_pattern


__all__ = [
    "PATTERNS",
    "Pattern",
    "get_pattern",
    "register_pattern",
    "block",
    "channel",
    "coupled",
    "n_of_m",
    "unstructured",
]
