"""Loading of data sets from files or from the Hub, with errors raised before any work starts."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset


# Tab-separated files are read without quoting, as the GLUE files need: a quote character there is part of the text.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "csv": ("csv", {}),
    "tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "parquet": ("parquet", {}),
    "txt": ("text", {}),
}
TABLE_FILES = ("csv", "tsv", "json", "jsonl", "parquet")


def import_datasets() -> ModuleType:
    """Imports the datasets library, which only text needs: pruning with batches of tensors works without it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading texts needs the datasets library: run `pip install datasets`, or pass batches of tensors."
        ) from error
    return datasets


def check_files(files: Mapping[str, str | None], extensions: Sequence[str]) -> dict[str, Path]:
    """Returns the paths of the splits that have a file.

    Args:
        files: split name -> file name or None.
        extensions: the allowed extensions, without the dot.

    Raises:
        FileNotFoundError, ValueError: listing every missing file and every wrong extension.
    """
    paths = {split: Path(name) for split, name in files.items() if name is not None}
    missing = [f'{split} file "{files[split]}" does not exist.' for split in paths if not paths[split].is_file()]
    allowed = ", ".join(f".{name}" for name in extensions)
    wrong = [
        f'{split} file "{files[split]}" must end with one of: {allowed}.'
        for split, path in paths.items()
        if extension(path) not in extensions
    ]
    if wrong:
        raise ValueError("\n".join(wrong + missing))
    if missing:
        raise FileNotFoundError("\n".join(missing))
    return paths


def extension(path: Path) -> str:
    """Returns the extension without its dot, in lower case: "csv" for "data/Train.CSV"."""
    return path.suffix.lstrip(".").lower()


def load_files(
    files: Mapping[str, str | None],
    extensions: Sequence[str] = TABLE_FILES,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> DatasetDict | dict[str, IterableDataset]:
    """Loads one file per split. The splits may come in different formats.

    Args:
        files, extensions: as in `check_files`.
        cache_dir: folder of the prepared data; that of the datasets library if None.
        **kwargs: passed to `datasets.load_dataset` (`streaming=True`, `keep_linebreaks=...`).

    Raises:
        FileNotFoundError, ValueError: if a file is missing, of another format, damaged or empty.
    """
    datasets = import_datasets()
    splits = {}
    for split, path in check_files(files, extensions).items():
        builder, options = BUILDERS[extension(path)]
        if not path.stat().st_size:
            raise ValueError(f'{split} file "{path}" is empty.')
        try:
            splits[split] = datasets.load_dataset(
                builder, data_files=str(path), split="train", cache_dir=cache_dir, **options, **kwargs
            )
        except datasets.exceptions.DatasetGenerationError as error:
            reason = error.__cause__ or error
            raise ValueError(f'{split} file "{path}" cannot be read as {extension(path)}: {reason}') from error
        if isinstance(splits[split], datasets.Dataset) and len(splits[split]) == 0:
            raise ValueError(f'{split} file "{path}" has no rows.')
    return splits if kwargs.get("streaming") else datasets.DatasetDict(splits)


def load_from_hub(
    name: str,
    config: str | None,
    cache_dir: str | None,
    token: str | None,
    remedy: str = "`train_file`, `validation_file` and `test_file`",
    **kwargs: Any,
) -> Dataset | IterableDataset | DatasetDict:
    """Loads a data set by its name on the Hub, or from a folder of that name.

    Args:
        name, config, cache_dir, token, **kwargs: as in `datasets.load_dataset`.
        remedy: options that take local files, for the error message.

    Raises:
        ConnectionError: if the Hub cannot be reached.
    """
    try:
        return import_datasets().load_dataset(name, config, cache_dir=cache_dir, token=token, **kwargs)
    except ConnectionError as error:
        raise ConnectionError(
            f'data set "{name}" could not be loaded from the Hub ({error}). Check the connection and HF_HUB_OFFLINE, '
            f"or pass local files with {remedy}."
        ) from error


def format_names(names: Iterable[str]) -> str:
    """Returns names quoted for an error message, as in '"a", "b"'; "nothing" if there are none."""
    return ", ".join(f'"{name}"' for name in names) or "nothing"
