"""The tuning file of a checkpoint: the options of the tuning, the trained updates, and the weights at the start."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...engine.saved_state import is_count
from ...files import TUNING_FILE, open_tensors, parse_json, write_tensors
from ..state_files import METADATA_KEY, checksum
from .base import TUNINGS, Tuning


FORMAT_VERSION = 1
"""Version of the JSON description, to be raised when earlier versions of the package would misread it."""


@dataclass(frozen=True)
class TuningState:
    """An open tuning file: tensors that are read when they are asked for, and the JSON values that describe them."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    values: dict[str, Any]

    @classmethod
    def open(cls, directory: str | Path) -> TuningState | None:
        """Opens the tuning file in `directory`; None if there is none.

        Raises:
            ValueError: the file is damaged, of another program, or of a later version of this package.
        """
        path = Path(directory) / TUNING_FILE
        if not path.is_file():
            return None
        tensors, metadata = open_tensors(path)
        if METADATA_KEY not in metadata:
            raise ValueError(f"it lacks the metadata {METADATA_KEY}")
        values = parse_json(metadata[METADATA_KEY])
        _check_description(values)
        return cls(path, tensors, values)

    def verify(self, step: int | None = None) -> None:
        """Compares the checksum.

        Args:
            step: the optimizer step of the weights; None if it is not known.

        Raises:
            ValueError: it differs, a tensor cannot be read, or the file is of another step.
        """
        if step is not None and self.values["step"] != step:
            raise ValueError(f"it is of step {self.values['step']}, the weights are of step {step}")
        values = {name: value for name, value in self.values.items() if name != "checksum"}
        try:
            computed = checksum(self.tensors, values)
        except (OSError, RuntimeError) as error:
            raise ValueError(str(error)) from error
        if self.values["checksum"] != computed:
            raise ValueError("its checksum is not the one saved with it")

    def difference(self, tuning: Tuning) -> str | None:
        """Returns how the options of the saved tuning differ from those of `tuning`; None if they do not."""
        saved, current = ({name: values[name] for name in _OPTIONS} for values in (self.values, describe(tuning)))
        return None if saved == current else f"{reprlib.repr(saved)} -> {reprlib.repr(current)}"

    def tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns a saved tensor on the device of `like`.

        Raises:
            ValueError: it is missing, or of another shape or dtype than `like`.
        """
        if name not in self.tensors:
            raise ValueError(f'it lacks "{name}"')
        tensor = self.tensors[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(
                f'"{name}" is {tensor.dtype} of shape {tuple(tensor.shape)} instead of {like.dtype} of '
                f"{tuple(like.shape)}"
            )
        return tensor.to(like.device)


_OPTIONS = ("tune", "tune_kwargs")


def describe(tuning: Tuning) -> dict[str, Any]:
    """Returns the name of a tuning and its options that differ from their defaults, as JSON values."""
    return dict(zip(_OPTIONS, TUNINGS.name_and_options(tuning), strict=True))


def write_tuning_file(directory: str | Path, tuning: Tuning, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Writes what a resumed run needs of a tuning at optimizer step `step`."""
    values = {"version": FORMAT_VERSION, "step": step, **describe(tuning)}
    values["checksum"] = checksum(tensors, values)
    write_tensors(Path(directory) / TUNING_FILE, dict(tensors), {"format": "pt", METADATA_KEY: json.dumps(values)})


def _check_description(values: Any) -> None:
    """Checks the JSON description of a tuning file. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"its description is {reprlib.repr(values)}")
    if not is_count(values.get("version")) or values["version"] > FORMAT_VERSION:
        raise ValueError(
            f"its format is {reprlib.repr(values.get('version'))}, and this version of hf_sparse reads up to "
            f"{FORMAT_VERSION}"
        )
    if not is_count(values.get("step")):
        raise ValueError(f"its step is {reprlib.repr(values.get('step'))}")
    if not isinstance(values.get("tune"), str) or not isinstance(values.get("tune_kwargs"), dict):
        raise ValueError("it does not say how the model was tuned")
    if "checksum" not in values:
        raise ValueError("it lacks its checksum")
