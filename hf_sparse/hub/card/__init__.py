"""The model card of a sparse model: what was pruned, how, out of what, and what it cost.

It is made from files alone, so it can be made again: the report, the config, and `pruning_card.json` beside them.
"""

from ...files import CARD_FILE, README_FILE
from ..model_classes import auto_class
from .data import SparsityCard, select_metrics
from .writing import (
    PUBLISHED_FILES,
    CardVersion,
    download_card,
    has_card_files,
    parse_card,
    recount_zeros,
    render_card,
    rewrite_card,
    write_card,
)


__all__ = [
    "CARD_FILE",
    "has_card_files",
    "PUBLISHED_FILES",
    "README_FILE",
    "SparsityCard",
    "CardVersion",
    "auto_class",
    "select_metrics",
    "parse_card",
    "download_card",
    "recount_zeros",
    "render_card",
    "rewrite_card",
    "write_card",
]
