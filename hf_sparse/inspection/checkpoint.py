"""A checkpoint's headers: what its tensors are, and what lies beside them. No values are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..files import CONFIG_FILE, REPORT_FILE
from ..reporting.report import SparsityReport
from .files import InspectionError, find_weights, read_json


# The types whose zeros are counted. Numbers of one byte or less are codes, whose zero need not be the weight's.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it.

    Args:
        name, shape: as saved.
        dtype: in the words of safetensors, such as "BF16" or "F8_E4M3".
        file: that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether its values are the numbers themselves."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint before a value is read.

    Args:
        place: as it was named.
        files: that hold the weights.
        tensors: by name, in the order of the files.
        shared: names that were left out -> the tensor of the same memory, as the files' metadata tell.
        config: of the model (config.json); {} if there is none.
        report: what a run of hf_sparse left beside the weights (pruning_report.json), if it did.
        pruning_config: the same of its options (pruning_config.json), as they are written; {} if there are none.
    """

    place: str
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    shared: dict[str, str]
    config: dict[str, Any]
    report: SparsityReport | None
    pruning_config: dict[str, Any]


def open_checkpoint(place: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and read its headers.

    Raises:
        InspectionError: it cannot be found or read.
    """
    files = find_weights(place, revision)
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
                f"{file} is cut short or is no safetensors file: {error}. Copy or download it again."
            ) from error
    folder = files[0].parent
    _check_index(folder, files, tensors)
    return Checkpoint(
        str(place),
        tuple(files),
        tensors,
        {name: kept for name, kept in shared.items() if kept in tensors and name not in tensors},
        read_json(folder / "config.json"),
        _report(folder / REPORT_FILE),
        read_json(folder / CONFIG_FILE),
    )


def _check_index(folder: Path, files: list[Path], tensors: dict[str, StoredTensor]) -> None:
    """See that the files hold what the index that names them says. Others may lie there, of other formats."""
    for index in folder.glob("*.safetensors.index.json") if len(files) > 1 else ():
        names = read_json(index).get("weight_map", {})
        absent = names.keys() - tensors.keys()
        if absent and set(names.values()) == {file.name for file in files}:
            raise InspectionError(
                f"{index} names {len(absent)} tensors that are not in its files, such as {min(absent)}: copy or "
                "download the checkpoint again."
            )


def _report(path: Path) -> SparsityReport | None:
    values = read_json(path)
    try:
        return SparsityReport.from_dict(values) if values else None
    except (KeyError, TypeError) as error:
        raise InspectionError(f"{path} is no report of hf_sparse: {error!r}. Remove or replace it.") from error
