"""State files: the masks, gradient statistics and compared options of a run, saved beside the weights of a checkpoint.

A run that holds whole weights writes one file. Where weights are sharded, each rank writes a file with its shards; any
number of ranks can read the files back, see `ResumeState`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..config import PruningConfig, upgrade_options
from ..config.distillation import DistillationOptions
from ..config.options import EARLIER_DEFAULTS
from ..config.schedule import unused_schedule_options
from ..distributed import get_communicator
from ..engine.pruner import Pruner
from ..files import (
    DISTILLATION_FILE,
    STATE_FILE,
    STATE_GLOB,
    STATE_SHARD_PATTERN,
    TEMPORARY_GLOB,
    TUNING_FILE,
    state_shard_file,
    write_tensors,
)
from ..schedulers import PruningSchedule
from .algorithm_run import AlgorithmRun
from .rewinding import Rewinding


METADATA_KEY = "hf_sparse"
"""Key of the JSON description in the metadata of the safetensors file."""
FORMAT_VERSION = 1
"""Version of that description, to be raised when earlier versions of the package would misread it. A file without a
version is of version 0, which lacks only the version."""

IN_STEPS = " (steps)"
"""Ends the names of options that are compared as numbers of optimizer steps, however they were given."""

# Of the text of one option in an error.
_MAX_LENGTH = 300
# Options that are compared by their effect instead: the steps of the schedule, the selected weights, and the teacher.
_COMPARED_BY_EFFECT = (
    *("prune_start", "prune_end", "prune_every", "rewind", "targets", "exclude"),
    *(field.name for field in dataclasses.fields(DistillationOptions)),
)


def find_state_files(directory: str | Path) -> list[Path]:
    """Returns the state files in `directory`, in the order of the ranks that wrote them; [] if there is none.

    Raises:
        ValueError: some of the files are missing, by the rank count in the names of the others.
    """
    directory = Path(directory)
    paths = _state_files(directory)
    if not paths:
        return []
    last = paths[-1]
    match = STATE_SHARD_PATTERN.fullmatch(last.name)
    if match is None:
        return [last]
    found, count = {path.name for path in paths}, int(match["count"])
    # The count is in a file's name, which anybody can have given: it is not counted up to where files are missing.
    names = (state_shard_file(rank, count) for rank in range(count))
    present = list(itertools.takewhile(found.__contains__, names))
    if len(present) < count:
        raise ValueError(f"{state_shard_file(len(present), count)}: missing, though there is {last.name}.")
    return [directory / name for name in present]


def _state_files(directory: Path) -> list[Path]:
    """Returns all files with the name of a state file, first the one of a single rank, then by their rank count."""
    paths = [directory / STATE_FILE] if (directory / STATE_FILE).is_file() else []
    matches = [STATE_SHARD_PATTERN.fullmatch(path.name) for path in directory.glob(STATE_GLOB) if path.is_file()]
    numbers = sorted((int(match["count"]), int(match["number"]), match.string) for match in matches if match)
    return paths + [directory / name for *_, name in numbers]


def write_state_file(
    directory: str | Path,
    pruner: Pruner,
    schedule: PruningSchedule,
    step: int,
    is_main: bool = True,
    run: AlgorithmRun | None = None,
    rewinding: Rewinding | None = None,
) -> None:
    """Writes what a resumed run needs at optimizer step `step`. All ranks call this; where every rank holds whole
    weights, the main one writes."""
    rank, shard_count = pruner.communicator.rank, pruner.communicator.world_size
    if shard_count == 1 and not is_main:
        return
    name = STATE_FILE if shard_count == 1 else state_shard_file(rank, shard_count)
    tensors, values = pruner.state_dict(None if run is None else run.tensors())
    values["algorithm"] = {} if run is None else run.values()
    if rewinding is not None:
        tensors, values = tensors | rewinding.tensors(), values | rewinding.values()
    values |= {"version": FORMAT_VERSION, "config": compared_options(pruner.config, schedule), "step": step}
    values["defaults"] = {name: getattr(pruner.config, name) for name in EARLIER_DEFAULTS}
    values["processes"] = get_communicator().world_size
    values["checksum"] = checksum(tensors, values)
    write_tensors(Path(directory) / name, tensors, {"format": "pt", METADATA_KEY: json.dumps(values)})


def delete_state_files(directory: str | Path) -> None:
    """Deletes the state files of an earlier run, which may have had more ranks, and temporary files."""
    leftovers = [path for path in Path(directory).glob(TEMPORARY_GLOB) if path.is_file()]
    others = (Path(directory) / name for name in (TUNING_FILE, DISTILLATION_FILE))
    for path in [*leftovers, *_state_files(Path(directory)), *others]:
        path.unlink(missing_ok=True)


def start_checkpoint(directory: str | Path) -> None:
    """Prepares a folder for a new checkpoint: deletes `trainer_state.json`, which marks a checkpoint as complete, and
    the state files of pruning that an earlier checkpoint has left there."""
    (Path(directory) / "trainer_state.json").unlink(missing_ok=True)
    delete_state_files(directory)


def checksum(tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> int:
    """Returns the CRC-32 of names, dtypes, shapes and bytes of the tensors and of the JSON values."""
    crc = zlib.crc32(json.dumps(values, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def compared_options(config: PruningConfig, schedule: PruningSchedule | None) -> dict[str, Any]:
    """Returns the options that must be equal for a run to be resumed, as JSON values. The schedule is None while the
    number of training steps is not known. Steps that have no effect are None."""
    values = PruningConfig.to_dict(config)
    options = {name: value for name, value in values.items() if name not in _COMPARED_BY_EFFECT}
    options["criterion"] = config.resolve_criterion(SimpleNamespace(**options))
    if schedule is not None:
        steps: dict[str, int | None] = {"prune_start": schedule.start, "prune_end": schedule.end}
        steps |= {"prune_every": schedule.every, "rewind": schedule.rewind}
        steps |= dict.fromkeys(unused_schedule_options(values))
        options |= {f"{name}{IN_STEPS}": value for name, value in steps.items()}
    return json.loads(json.dumps(options))


def changed_options(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Compares the `compared_options` of a checkpoint, which an earlier version may have written, with those of this
    run. An option that the checkpoint lacks had its default value at that time.

    Returns: "`name`: saved value -> current value" for each option that differs.
    """
    saved = PruningConfig.drop_unused_scopes(PruningConfig().to_dict() | EARLIER_DEFAULTS | upgrade_options(saved))
    # Earlier versions have written the numbers of steps that have no effect.
    unused = [f"{name}{IN_STEPS}" for name in ("prune_end", "prune_every")]
    saved |= {name: None for name in unused if name in current and current[name] is None}
    return [
        f"{_in_backticks(name)}: {_shortened(saved.get(name))} -> {_shortened(value)}"
        for name, value in current.items()
        if saved.get(name) != value
    ]


def _in_backticks(option: str) -> str:
    name = option.removesuffix(IN_STEPS)
    return f"`{name}`{option[len(name) :]}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
