"""The headers of a checkpoint's weight files, and the JSON files beside them. No values are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..files import CONFIG_FILE, REPORT_FILE
from ..reporting.report import SparsityReport
from .weight_files import InspectionError, find_weight_files, read_json


# Types whose zeros are counted. Values of one byte or less are codes: a code of zero need not be a weight of zero.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it; `dtype` as safetensors writes it, such as "BF16" or "F8_E4M3"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the type is a float of 16 bits or more."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint and the files beside its weights.

    Args:
        source: path or repository name that it was opened by.
        tensors: name -> tensor, in the order of `files`.
        shared: name that the files leave out -> name of the stored tensor that it shares memory with, from the files'
            metadata.
        config, report, pruning_config: contents of config.json, pruning_report.json and pruning_config.json; {} or
            None without one.
    """

    source: str
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    shared: dict[str, str]
    config: dict[str, Any]
    report: SparsityReport | None
    pruning_config: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of the weight files."""
        return self.files[0].parent


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint and reads its headers.

    Args:
        source: a .safetensors file, an index, a directory, or the name of a repository on the Hub.
        revision: branch, tag or commit of the repository.

    Raises:
        InspectionError: if it cannot be found or read.
    """
    files = find_weight_files(source, revision)
    tensors: dict[str, StoredTensor] = {}
    shared: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():
                    view = opened.get_slice(name)
                    tensors[name] = StoredTensor(name, view.get_dtype(), tuple(view.get_shape()), file)
                shared |= opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise InspectionError(
                f"{file} is cut short or not a safetensors file: {error}. Copy or download it again."
            ) from error
    folder = files[0].parent
    if len(files) > 1:
        _check_index(folder, files, tensors)
    return Checkpoint(
        str(source),
        tuple(files),
        tensors,
        {name: kept for name, kept in shared.items() if kept in tensors and name not in tensors},
        read_json(folder / "config.json"),
        _read_report(folder / REPORT_FILE),
        read_json(folder / CONFIG_FILE),
    )


def _check_index(folder: Path, files: list[Path], tensors: dict[str, StoredTensor]) -> None:
    """Checks that the files hold all tensors of their index. The folder may hold indices of other formats as well."""
    for index in folder.glob("*.safetensors.index.json"):
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or {str(name) for name in file_of.values()} != {file.name for file in files}:
            continue
        if missing := file_of.keys() - tensors.keys():
            raise InspectionError(
                f"{index} names {len(missing)} tensors that are not in its files, such as {min(missing)}: copy or "
                "download the checkpoint again."
            )


def _read_report(path: Path) -> SparsityReport | None:
    try:
        return SparsityReport.load(path) if path.is_file() else None
    except ValueError as error:
        raise InspectionError(f"{error}") from error
