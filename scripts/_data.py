"""Data sets of the example scripts: the readers of the package, and the choice of splits, rows and columns."""

from datasets import Dataset

from hf_sparse.calibration.data_files import TABLE_FILES, check_files, format_names, load_files, load_from_hub


__all__ = [
    "TABLE_FILES",
    "check_columns",
    "check_files",
    "first_rows",
    "load_files",
    "load_from_hub",
    "need_split",
]


def need_split(splits, names: tuple[str, ...], flag: str, remedy: str) -> list[str]:
    """Returns those of the named splits that exist.

    Args:
        splits: split name -> data set.
        names: acceptable split names.
        flag: the option that needs the split, for the error text.
        remedy: the option that provides it, for the error text.

    Raises:
        ValueError: none of the splits exists.
    """
    found = [name for name in names if name in splits]
    if not found:
        raise ValueError(
            f"`{flag}` needs a split named {format_names(names)}, but the data has {format_names(splits)}. "
            f"Pass `{remedy}`."
        )
    return found


def first_rows(dataset: Dataset, limit: int | None) -> Dataset:
    """Returns the first `limit` rows, or all of them if there are fewer or `limit` is None."""
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def check_columns(columns: list[str], needed: tuple[str, ...], split: str) -> None:
    """Raises an error if the split lacks one of the needed columns."""
    absent = [column for column in needed if column not in columns]
    if absent:
        raise ValueError(
            f"the {split} split has no column {format_names(absent)}: it has {format_names(columns)}. Rename the "
            f"columns of the file (needed: {format_names(needed)})."
        )
