"""The state files of a run: masks, the criteria's sums, and the config to compare with.

One file where every process holds whole weights. Where weights are split each process writes what it holds, and any
number of processes can read it back.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import PruningConfig, upgrade_options
from ..distributed import ShardRegion, full_region, get_communicator
from ..engine.masks import unpack_mask
from ..engine.pruner import Pruner
from ..engine.resolve import resolve_layers
from ..files import (
    STATE_FILE,
    STATE_GLOB,
    STATE_SHARD_FILE,
    TEMPORARY_GLOB,
    open_tensors,
    state_shard_file,
    write_tensors,
)
from ..schedulers import PruningSchedule


_FIELDS = {"shapes", "boxes", "counters", "config", "step", "processes"}

# Options that act through something else which is compared: the cadence they come to, the weights they select.
_RESOLVED = ("prune_start", "prune_end", "prune_every", "targets", "exclude")


class CheckpointError(ValueError):
    """A checkpoint that pruning cannot go on from: what is wrong, and the remedy."""


def write_state(
    directory: str | Path, pruner: Pruner, schedule: PruningSchedule, step: int, main: bool = True
) -> None:
    """Write what a resumed run needs. All processes call this; where weights are whole only `main` ones write."""
    rank, size = pruner.communicator.rank, pruner.communicator.world_size
    if size == 1 and not main:
        return
    name = STATE_FILE if size == 1 else state_shard_file(rank, size)
    tensors, values = pruner.state_dict()
    values |= {"config": _identity(pruner.config, schedule), "step": step, "processes": get_communicator().world_size}
    values["checksum"] = _checksum(tensors, values)
    write_tensors(Path(directory) / name, tensors, {"format": "pt", "hf_sparse": json.dumps(values)})


def state_files(directory: str | Path) -> list[Path]:
    """The state files in `directory`, or those that should be there; [] if there is no sign of any."""
    directory = Path(directory)
    counts = {
        int(match["count"]) for path in directory.glob(STATE_GLOB) if (match := STATE_SHARD_FILE.fullmatch(path.name))
    }
    if counts:
        size = max(counts)
        return [directory / state_shard_file(rank, size) for rank in range(size)]
    return [directory / STATE_FILE] if (directory / STATE_FILE).is_file() else []


def clear_states(directory: str | Path) -> None:
    """Remove the masks of an earlier run, perhaps of more processes, and what a killed one left half-written."""
    for pattern in (TEMPORARY_GLOB, STATE_GLOB):
        for leftover in Path(directory).glob(pattern):
            leftover.unlink(missing_ok=True)


State = tuple[Mapping[str, torch.Tensor], dict[str, Any]]


def read_states(directory: str | Path) -> list[State]:
    """What each file holds: tensors, each read when it is asked for, and values.

    Raises:
        CheckpointError: a file is missing, cut short, or another program's.
    """
    paths = state_files(directory)
    if not paths:
        raise CheckpointError(
            f"{directory} holds no masks ({STATE_FILE}): it was not saved by a pruning run. Resume from a checkpoint "
            "that was, or start a new run from its weights with model_name_or_path (and keep_zeros=True to lock the "
            "zeros they have)."
        )
    return [_read(path) for path in paths]


def _read(path: Path) -> State:
    try:
        tensors, metadata = open_tensors(path)
        values = json.loads(metadata["hf_sparse"])
        if not _FIELDS <= set(values):
            raise ValueError("its description is incomplete")
        return tensors, values
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception | str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or foreign: {error}. Resume from an earlier checkpoint.")


def _verify(directory: str | Path, states: list[State]) -> None:
    """See that the files are as they were written. Several processes share the work."""
    peers = get_communicator()
    own = range(len(states)) if len(states) == 1 else range(peers.rank, len(states), peers.world_size)
    for index in own:
        tensors, values = states[index]
        given = {name: value for name, value in values.items() if name != "checksum"}
        if values.get("checksum") != _checksum(tensors, given):
            raise _damaged(state_files(directory)[index], "its checksum is not the one saved with it")


def _checksum(tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> int:
    """One number over everything that is saved: a flipped bit changes it."""
    checksum = zlib.crc32(json.dumps(values, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def check_state(
    directory: str | Path, model, config: PruningConfig, schedule: PruningSchedule | None, step: int | None = None
) -> None:
    """See that the masks in `directory` fit the run, before anything of it changes. All processes call this at once.

    Args:
        model, config: of the run.
        cadence: of this run, or None while the number of training steps is not known.
        step: the optimizer step that the checkpoint must be of, if known.

    Raises:
        CheckpointError: missing, damaged or foreign masks, or another pruning config: with every field that differs.
    """
    error = None
    try:
        states = read_states(directory)
        _verify(directory, states)
        shapes = {
            layer.name: list(layer.shape) for group in resolve_layers(model, config)[0] for layer in group.layers
        }
        for _, values in states:
            _compare(directory, values, shapes, _identity(config, schedule), step)
    except CheckpointError as problem:
        error = problem
    get_communicator().raise_together(error)


def _compare(directory, values: dict[str, Any], shapes: dict, identity: dict, step: int | None) -> None:
    differing = sorted(
        name for name in shapes.keys() | values["shapes"].keys() if shapes.get(name) != values["shapes"].get(name)
    )
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"the masks in {directory} are of other weights than this run selects: {len(differing)} differ, such as "
            f'"{name}" (saved {values["shapes"].get(name)}, selected {shapes.get(name)}). Use the same model, targets '
            "and exclude."
        )
    saved = upgrade_options(values["config"])
    changes = [f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in identity.items() if saved.get(key) != value]
    if changes:
        raise CheckpointError(
            f"the pruning config differs from that of {directory}: {'; '.join(changes)}. Resume with the saved "
            "values, or start a new run from its weights."
        )
    if step is not None and values["step"] != step:
        raise CheckpointError(f"the masks in {directory} are of step {values['step']}, its weights of step {step}.")


def restore_state(directory: str | Path, pruner: Pruner) -> None:
    """Put masks and sums back, in all processes at once.

    Raises:
        CheckpointError: they do not fit the weights.
    """
    error = None
    try:
        pruner.load_state_dict(*read_states(directory))
    except (ValueError, KeyError) as problem:
        error = CheckpointError(f"{directory}: {problem} Resume from another checkpoint.")
        error.__cause__ = problem
    get_communicator().raise_together(error)


def read_masks(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and mask (bool, True is kept) of each pruned weight in a checkpoint, one whole mask at a time.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    states = read_states(directory)
    _verify(directory, states)
    for name, shape in states[0][1]["shapes"].items():
        mask = torch.zeros(shape, dtype=torch.bool)
        for tensors, values in states:
            boxes = [ShardRegion(tuple(start), tuple(stop)) for start, stop in values["boxes"].get(name, ())]
            flat = unpack_mask(tensors[f"mask/{name}"], sum(box.numel for box in boxes))
            for box, part in zip(boxes, flat.split([box.numel for box in boxes]), strict=True):
                mask[box.slices_in(full_region(shape))] = part.view(box.shape)
        yield name, mask


def _identity(config: PruningConfig, schedule: PruningSchedule | None) -> dict[str, Any]:
    """What must be equal for a run to go on, as JSON values."""
    identity = {name: value for name, value in PruningConfig.to_dict(config).items() if name not in _RESOLVED}
    identity["criterion"] = config.resolve_criterion(config)
    if schedule is not None:
        steps = {"prune_start": schedule.start, "prune_end": schedule.end, "prune_every": schedule.every}
        identity |= {f"{name} (steps)": value for name, value in steps.items()}
    return json.loads(json.dumps(identity))
