"""Tables of texts from a file, the Hub or memory, and the choice of their columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from .data_files import TABLE_FILES, format_names, import_datasets, load_files, load_from_hub
from .questions import read_wrapped_rows


if TYPE_CHECKING:
    from datasets import Dataset


TEXT_COLUMNS = ("text", "sentence")
MAX_STREAMED_ROWS = 10_000


def load_texts(
    file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    cache_dir: str | None = None,
    purpose: str = "calibration",
) -> Dataset:
    """Loads a table of texts from a file or from the Hub.

    Args:
        file: .txt (one text per line), .json, .jsonl, .csv, .tsv or .parquet. A .json file may hold {"data": [rows]},
            or the nested paragraphs of SQuAD.
        dataset_name, dataset_config_name, split: of a data set on the Hub, in place of a file.
        streaming: read the first `MAX_STREAMED_ROWS` rows of the data set without downloading the others.
        cache_dir: folder of downloads and prepared data.
        purpose: "calibration" or "validation", for error messages.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: if the data are missing or cannot be read.
    """
    remedy = f"`{purpose}_file`"
    if file is not None and dataset_name is None:
        options = {"keep_linebreaks": True} if str(file).lower().endswith(".txt") else {}
        if str(file).lower().endswith(".json") and Path(file).is_file() and (wrapped := read_wrapped_rows(Path(file))):
            return import_datasets().Dataset.from_list(wrapped)
        return load_files({purpose: file}, (*TABLE_FILES, "txt"), cache_dir, **options)[purpose]
    if dataset_name is None or file is not None:
        raise ValueError(
            f"{purpose} data come from a file or from a data set: pass {remedy} or `dataset_name`, not both."
        )
    options = {"streaming": True} if streaming else {}
    rows: Any = load_from_hub(dataset_name, dataset_config_name, cache_dir, None, remedy, split=split, **options)
    return import_datasets().Dataset.from_list(list(rows.take(MAX_STREAMED_ROWS))) if streaming else rows


def is_dataset(data: Any) -> TypeGuard[Dataset]:
    """Whether `data` is a `datasets.Dataset`. Does not import that library: without it there is none."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.Dataset)


def find_text_columns(rows: Dataset, requested: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the name of the column that holds the texts, or of both columns of text pairs.

    `requested` is the name, or two names for pairs, also as "first,second". If None: "text", "sentence", or the only
    column of strings.

    Raises:
        ValueError: a named column is missing, or more than two are named; or none is named, and several columns or
            none could be meant.

    Example:
        >>> from datasets import Dataset
        >>> find_text_columns(Dataset.from_dict({"label": [1], "review": ["good"]}), None)
        ('review',)
    """
    if requested is not None:
        split = requested.split(",") if isinstance(requested, str) else requested
        names = tuple(name.strip() for name in split)
        if not 1 <= len(names) <= 2:
            raise ValueError(f"`text_column` names {len(names)} columns: it must be one, or two for pairs of texts.")
        check_columns(rows, names)
        return names
    if usual := [name for name in TEXT_COLUMNS if name in rows.column_names]:
        return (usual[0],)
    dtypes = {name: getattr(feature, "dtype", feature) for name, feature in rows.features.items()}
    strings = [name for name, dtype in dtypes.items() if dtype in ("string", "large_string")]
    if len(strings) > 1:
        raise ValueError(f"{len(strings)} columns hold texts ({', '.join(strings)}): name one with `text_column`.")
    if not strings:
        columns = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"no text column found (columns: {columns}): name one with `text_column`.")
    return (strings[0],)


def check_columns(rows: Dataset, names: Sequence[str]) -> None:
    """Raises a ValueError if the table lacks any of the named columns."""
    absent = [name for name in names if name not in rows.column_names]
    if absent:
        raise ValueError(
            f"there is no column {format_names(absent)}: the data have {format_names(rows.column_names)}."
        )


def is_text(row: Any) -> bool:
    """Whether `row` is a text, a pair of texts or a mapping with texts or lists of words, and not a batch of tensors.

    Example:
        >>> is_text({"tokens": ["a", "film"], "labels": [0, 1]}), is_text({"input_ids": [[2, 3]]})
        (True, False)
    """
    values = row.values() if isinstance(row, Mapping) else row if isinstance(row, (tuple, list)) else [row]
    return any(isinstance(item, str) for value in values for item in (value if isinstance(value, list) else [value]))


def to_table(rows: Sequence[Any]) -> tuple[Dataset, tuple[str, ...] | None]:
    """Turns texts, pairs of texts or mappings into a table.

    Returns: the table, and the names of its text columns; None for mappings, whose columns are the user's.
    """
    if not rows:
        raise ValueError("there is no calibration text: give some.")
    table = import_datasets().Dataset
    if isinstance(rows[0], Mapping):
        return table.from_list([dict(row) for row in rows]), None
    pairs = [(row,) if isinstance(row, str) or row is None else tuple(row) for row in rows]
    if any(len(pair) != len(pairs[0]) for pair in pairs) or len(pairs[0]) > 2:
        raise ValueError("the rows must be all texts, or all pairs of texts.")
    names = ("text", "text_pair")[: len(pairs[0])]
    return table.from_dict(dict(zip(names, map(list, zip(*pairs, strict=True)), strict=True))), names
