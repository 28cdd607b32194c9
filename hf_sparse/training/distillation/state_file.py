"""The distillation file of a checkpoint: the options of the run and a checksum of the teacher's weights, by which a
resumed run learns from the same teacher."""

from __future__ import annotations

import reprlib
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ...config import PruningConfig
from ...config.distillation import SELF
from ...files import DISTILLATION_FILE, parse_json, read_text, write_json
from ...local_paths import published_name
from ..resume import CheckpointError
from ..state_files import checksum


FORMAT_VERSION = 1
"""Version of the file, to be raised when earlier versions of the package would misread it."""

_OPTIONS = ("distill_alpha", "distill_temperature", "distill_hidden", "distill_teacher_dtype")


class DistillationState:
    """What must be equal for a run to be resumed: the options, and the weights of the teacher. Where the teacher is
    found may differ.

    Args:
        config: options of the run.
        teacher: with the weights that the run learns from.
    """

    def __init__(self, config: PruningConfig, teacher: nn.Module):
        self.config, self._teacher = config, teacher

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the teacher's names, dtypes, shapes and weights; takes about a second for each gigabyte."""
        return checksum(self._teacher.state_dict(), {})

    def save(self, directory: str | Path) -> None:
        """Writes the file into a checkpoint."""
        values: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "teacher": published_name(str(self.config.distill_teacher)),
        }
        values |= {name: getattr(self.config, name) for name in _OPTIONS}
        write_json(Path(directory) / DISTILLATION_FILE, values | {"checksum": self.checksum})

    def compare(self, checkpoint: str | Path) -> None:
        """Checks that a checkpoint is of a run with this teacher and these options.

        Raises:
            CheckpointError: it is not, with what differs.
        """
        path, saved = Path(checkpoint) / DISTILLATION_FILE, read_state(checkpoint)
        if saved is None:
            raise CheckpointError(
                f"{checkpoint} was saved by a run without `distill_teacher`, and this run has one. Resume without it, "
                "or start a new run from its weights."
            )
        changes = [
            f"`{name}`: {reprlib.repr(saved[name])} -> {getattr(self.config, name)!r}"
            for name in _OPTIONS
            if saved[name] != getattr(self.config, name)
        ]
        if changes:
            raise CheckpointError(
                f"the distillation differs from that of {path}: {'; '.join(changes)}. Resume with the saved "
                "values, or start a new run from its weights."
            )
        if saved["checksum"] != self.checksum:
            raise CheckpointError(self._other_teacher(path, saved["teacher"]))

    def _other_teacher(self, path: Path, name: str) -> str:
        if self.config.distill_teacher == SELF:
            return (
                f"`distill_teacher` is {SELF}, the weights that the run started from, but the trainer was made with a "
                f"model with other weights than the run of {path}: make it with the model that the run started "
                "from (Trainer loads the weights of the checkpoint by itself), or start a new run with "
                '`distill_teacher="PATH"` of a dense model.'
            )
        return (
            f"`distill_teacher` has other weights than that of {path}, {reprlib.repr(name)}: resume with the same "
            "teacher, or start a new run from the weights of the checkpoint."
        )


def read_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """Returns the values in the distillation file of a checkpoint; None without one.

    Raises:
        CheckpointError: it is damaged, or of a later version of this package.
    """
    path = Path(checkpoint) / DISTILLATION_FILE
    if not path.is_file():
        return None
    try:
        values = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Resume from an earlier checkpoint.") from error
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(f"{path} was written by a later version of hf_sparse: upgrade it, or start a new run.")
    if not isinstance(values, dict) or not isinstance(version, int) or {*_OPTIONS, "checksum", "teacher"} - {*values}:
        raise CheckpointError(f"{path} is damaged: it lacks values. Resume from an earlier checkpoint.")
    return values
