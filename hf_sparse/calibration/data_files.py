"""Data sets from files or from the Hub, and what is wrong with them told before any work starts."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError


# Tab-separated files are read without quoting, as the GLUE files need: a quote character there is part of the text.
BUILDERS = {
    "csv": ("csv", {}),
    "tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "parquet": ("parquet", {}),
    "txt": ("text", {}),
}
TABLE_FILES = ("csv", "tsv", "json", "jsonl", "parquet")


def check_files(files: dict[str, str | None], extensions: tuple[str, ...]) -> dict[str, Path]:
    """Drops the splits without a file and returns the others' paths.

    Args:
        files: split name -> file name or None.
        extensions: the allowed endings, without the dot.

    Raises:
        FileNotFoundError, ValueError: with every fault found, not only the first.
    """
    missing, wrong, paths = [], [], {}
    for split, name in files.items():
        if name is None:
            continue
        paths[split] = path = Path(name)
        if not path.is_file():
            missing.append(f'{split} file "{name}" does not exist.')
        if extension(path) not in extensions:
            wrong.append(f'{split} file "{name}" must end with one of: {", ".join("." + end for end in extensions)}.')
    if wrong:
        raise ValueError("\n".join(wrong + missing))
    if missing:
        raise FileNotFoundError("\n".join(missing))
    return paths


def extension(path: Path) -> str:
    """The ending without its dot, in lower case: "data/Train.CSV" gives "csv"."""
    return path.suffix.lstrip(".").lower()


def load_files(
    files: dict[str, str | None], extensions: tuple[str, ...] = TABLE_FILES, cache_dir: str | None = None, **kwargs
) -> DatasetDict | dict[str, IterableDataset]:
    """Loads one file per split; the splits may come in different formats.

    Args:
        files: split name -> file name or None.
        extensions: the allowed endings.
        kwargs: passed on to `load_dataset` (`streaming=True`, `keep_linebreaks=...`).
    """
    splits = {}
    for split, path in check_files(files, extensions).items():
        builder, options = BUILDERS[extension(path)]
        if not path.stat().st_size:
            raise ValueError(f'{split} file "{path}" is empty.')
        try:
            splits[split] = load_dataset(
                builder, data_files=str(path), split="train", cache_dir=cache_dir, **options, **kwargs
            )
        except DatasetGenerationError as error:
            reason = error.__cause__ or error
            raise ValueError(f'{split} file "{path}" cannot be read as {extension(path)}: {reason}') from error
        if isinstance(splits[split], Dataset) and len(splits[split]) == 0:
            raise ValueError(f'{split} file "{path}" has no rows.')
    return splits if kwargs.get("streaming") else DatasetDict(splits)


def load_from_hub(
    name: str,
    config: str | None,
    cache_dir: str | None,
    token: str | None,
    remedy: str = "--train_file, --validation_file and --test_file",
    **kwargs,
):
    """Loads a data set by its Hub name (or from a folder of that name). `remedy`: the options that take files."""
    try:
        return load_dataset(name, config, cache_dir=cache_dir, token=token, **kwargs)
    except ConnectionError as error:
        raise ConnectionError(
            f'data set "{name}" could not be loaded from the Hub ({error}). Check the connection and HF_HUB_OFFLINE, '
            f"or pass local files with {remedy}."
        ) from error


def check_columns(columns: list[str], needed: tuple[str, ...], split: str) -> None:
    """Refuses a split that lacks one of the needed columns."""
    absent = [column for column in needed if column not in columns]
    if absent:
        raise ValueError(
            f"the {split} split has no column {quoted(absent)}: it has {quoted(columns)}. Rename the columns of the "
            f"file (needed: {quoted(needed)})."
        )


def quoted(names: Iterable[str]) -> str:
    """Names for an error: "a", "b"."""
    return ", ".join(f'"{name}"' for name in names) or "nothing"
