"""Reads the scripts' data sets from files or from the Hub, and says what is wrong with them before training."""

import csv
import logging
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset


logger = logging.getLogger("scripts.data")

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
        splits[split] = load_dataset(
            builder, data_files=str(path), split="train", cache_dir=cache_dir, **options, **kwargs
        )
        if isinstance(splits[split], Dataset) and len(splits[split]) == 0:
            raise ValueError(f'{split} file "{path}" has no rows.')
    return splits if kwargs.get("streaming") else DatasetDict(splits)


def load_from_hub(name: str, config: str | None, cache_dir: str | None, token: str | None, **kwargs):
    """Loads a data set by its Hub name (or from a folder of that name)."""
    try:
        return load_dataset(name, config, cache_dir=cache_dir, token=token, **kwargs)
    except ConnectionError as error:
        raise ConnectionError(
            f'data set "{name}" could not be loaded from the Hub ({error}). Check the connection and HF_HUB_OFFLINE, '
            "or pass local files with --train_file, --validation_file and --test_file."
        ) from error


def check_columns(columns: list[str], needed: tuple[str, ...], split: str) -> None:
    """Refuses a split that lacks one of the needed columns."""
    absent = [column for column in needed if column not in columns]
    if absent:
        raise ValueError(
            f"the {split} split has no column {_quoted(absent)}: it has {_quoted(columns)}. Rename the columns of the "
            f"file (needed: {_quoted(needed)})."
        )


def need_split(splits, names: tuple[str, ...], flag: str, remedy: str) -> list[str]:
    """Returns those of the named splits that exist; refuses if there is none.

    Args:
        splits: split name -> data set.
        names: acceptable split names.
        flag: the option that needs the split, for the error text.
        remedy: the option that would bring it.
    """
    found = [name for name in names if name in splits]
    if not found:
        raise ValueError(
            f"{flag} needs a split named {_quoted(names)}, but the data has {_quoted(splits)}. Pass {remedy}."
        )
    return found


def first_rows(dataset: Dataset, limit: int | None) -> Dataset:
    """The first `limit` rows, or all of them if there are fewer or `limit` is None."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _quoted(names) -> str:
    return ", ".join(f'"{name}"' for name in names) or "nothing"
