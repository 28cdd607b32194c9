"""The model card of a sparse model: what was pruned, how, from what, and at which cost in quality.

A card is generated from files alone, so that it can be generated again: the report, the config, and pruning_card.json.
"""

from ..card_metadata import CardMetadata
from .data import SparsityCard, select_metrics
from .publishing import push_with_card
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
    "PUBLISHED_FILES",
    "CardMetadata",
    "CardVersion",
    "SparsityCard",
    "download_card",
    "has_card_files",
    "parse_card",
    "push_with_card",
    "recount_zeros",
    "render_card",
    "rewrite_card",
    "select_metrics",
    "write_card",
]
