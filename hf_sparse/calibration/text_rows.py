"""Rows of text: from a file, from the Hub, or from memory, and which of their columns matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from .data_files import TABLE_FILES, load_files, load_from_hub, quoted


TEXT_COLUMNS = ("text", "sentence")
STREAMED = 10_000
"""Rows that are read of a stream, which has no end."""


def load_texts(
    file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    cache_dir: str | None = None,
    what: str = "calibration",
) -> Dataset:
    """Rows of a file (.txt: lines; .json, .jsonl, .csv, .tsv, .parquet), or of a data set of the Hub.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: there is none, or it cannot be read.
    """
    remedy = f"--{what}_file"
    if (file is None) == (dataset_name is None):
        raise ValueError(
            f"{what} data come from a file or from a data set: pass {remedy} or --dataset_name, not both."
        )
    if file is not None:
        extra = {"keep_linebreaks": True} if str(file).lower().endswith(".txt") else {}
        return load_files({what: file}, (*TABLE_FILES, "txt"), cache_dir, **extra)[what]
    options = {"split": split} | ({"streaming": True} if streaming else {})
    data = load_from_hub(dataset_name, dataset_config_name, cache_dir, None, remedy, **options)
    return Dataset.from_list(list(data.take(STREAMED))) if isinstance(data, IterableDataset) else data


def text_columns(rows: Dataset, named: str | Sequence[str] | None) -> tuple[str, ...]:
    """The column of the texts, or both columns of pairs.

    Example:
        >>> text_columns(Dataset.from_dict({"label": [1], "review": ["good"]}), None)
        ('review',)
    """
    if named is not None:
        names = tuple(name.strip() for name in named.split(",")) if isinstance(named, str) else tuple(named)
        if not 1 <= len(names) <= 2:
            raise ValueError(f"text_column names {len(names)} columns: it must be one, or two for pairs of texts.")
        check_names(rows, names)
        return names
    for name in TEXT_COLUMNS:
        if name in rows.column_names:
            return (name,)
    texts = [
        name for name, kind in rows.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if len(texts) != 1:
        kinds = ", ".join(f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in rows.features.items())
        raise ValueError(f"{len(texts)} columns may hold the texts: name text_column, out of {kinds}.")
    return (texts[0],)


def check_names(rows: Dataset, names: Sequence[str]) -> None:
    """Refuse columns that the data lack."""
    absent = [name for name in names if name not in rows.column_names]
    if absent:
        raise ValueError(f"there is no column {quoted(absent)}: the data have {quoted(rows.column_names)}.")


def is_text(row: Any) -> bool:
    """Whether it is a text, a pair, or a mapping with texts; else it is a batch."""
    values = row.values() if isinstance(row, Mapping) else row if isinstance(row, (tuple, list)) else [row]
    return any(isinstance(value, str) for value in values)


def as_table(rows: Sequence[Any]) -> tuple[Dataset, tuple[str, ...] | None]:
    """Texts, pairs or mappings as a data set, and its text columns where they are known."""
    if not rows:
        raise ValueError("there is no calibration text: give some.")
    if isinstance(rows[0], Mapping):
        return Dataset.from_list([dict(row) for row in rows]), None
    pairs = [(row,) if isinstance(row, str) or row is None else tuple(row) for row in rows]
    if any(len(pair) != len(pairs[0]) for pair in pairs) or len(pairs[0]) > 2:
        raise ValueError("texts are given as texts, or as pairs of texts, all alike.")
    names = ("text", "text_pair")[: len(pairs[0])]
    return Dataset.from_dict(dict(zip(names, map(list, zip(*pairs)), strict=True))), names
