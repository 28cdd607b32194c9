"""Finds the checkpoint to resume from: the newest one that was written completely."""

from __future__ import annotations

import logging
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from ..distributed import get_communicator
from ..engine.saved_state import is_count
from ..files import parse_json, read_json, read_weight_index
from .resume import CheckpointError, ResumeState
from .state_files import find_state_files
from .torch_files import is_damaged_archive


logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{,17})")
# What an error about many checkpoints names.
_MAX_NAMED = 3


def newest_complete_checkpoint(output_dir: str | Path, weights_only: bool = False) -> ResumeState:
    """Returns the newest checkpoint in `output_dir` that is complete and holds undamaged masks.

    What is wrong with newer ones is logged. All ranks call this, and it returns the same checkpoint on each.

    Args:
        output_dir: the folder of the run.
        weights_only: whether the run saves without its optimizer (`save_only_model`).

    Raises:
        CheckpointError: there is no such checkpoint; what is wrong with each is named.
    """
    communicator = get_communicator()
    errors: list[str] = []
    for step in _steps_of_checkpoints(Path(output_dir)):
        state = ResumeState(Path(output_dir) / f"checkpoint-{step}")
        error = _find_error(state, weights_only)
        has_error = communicator.all_gather(torch.tensor([error is not None]))
        if not any(has_error):
            if errors and communicator.rank == 0:
                logger.warning("resuming from %s, the newest complete checkpoint.", state.checkpoint)
            return state
        error = error or "it is damaged on another rank."
        errors.append(f"{state.checkpoint.name}: {error}")
        if communicator.rank == [bool(flag) for flag in has_error].index(True):
            logger.warning("%s is skipped: %s", state.checkpoint, error)
    named = "".join(f" {error}" for error in errors[:_MAX_NAMED])
    more = f" {len(errors) - _MAX_NAMED} more with errors." if len(errors) > _MAX_NAMED else ""
    raise CheckpointError(
        f"no complete checkpoint in {output_dir}: start without `resume_from_checkpoint`, or name one.{named}{more}"
    )


def _first_of(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more}"


def _steps_of_checkpoints(output_dir: Path) -> list[int]:
    """Returns the steps of the checkpoints that any rank finds, the newest first."""
    matches = (_CHECKPOINT_NAME.fullmatch(path.name) for path in output_dir.glob("checkpoint-*") if path.is_dir())
    steps = torch.tensor([int(match[1]) for match in matches if match], dtype=torch.int64)
    return sorted(set(torch.cat(get_communicator().all_gather(steps)).tolist()), reverse=True)


def _find_error(state: ResumeState, weights_only: bool) -> str | None:
    """Returns why a run cannot resume from a checkpoint, whatever its config; None if it can."""
    error = find_checkpoint_error(state, weights_only)
    if error is not None:
        return error
    try:
        state.verify(read_step(state.checkpoint))
    except CheckpointError as masks_error:
        return str(masks_error)
    return None


def find_checkpoint_error(state: ResumeState, weights_only: bool = False) -> str | None:
    """Returns why a checkpoint is incomplete; None if it is complete.

    Trainer writes `trainer_state.json` last: a checkpoint whose saving was interrupted has none or a truncated one.
    A checkpoint whose deletion was interrupted lacks other files. A rank may have been slower than the one that
    writes `trainer_state.json`, so the files of each rank are looked for too. Only files that resuming reads are
    examined. Missing masks are not an error here.

    Args:
        state: the checkpoint.
        weights_only: whether the run saves without its optimizer (`save_only_model`).
    """
    try:
        return _find_error_in_files(state, weights_only)
    except (OSError, ValueError) as error:
        return str(error)


def _find_error_in_files(state: ResumeState, weights_only: bool) -> str | None:
    checkpoint = state.checkpoint
    step = read_step(checkpoint)
    if _CHECKPOINT_NAME.fullmatch(checkpoint.name) and checkpoint.name != f"checkpoint-{step}":
        return f"{_STATE} is of step {step}."
    if (checkpoint / "config.json").is_file():
        read_json(checkpoint / "config.json")
    weights = _weight_files(checkpoint)
    if not weights and not any(any(checkpoint.glob(pattern)) for pattern in _SHARDED_WEIGHTS):
        return "it holds no weights."
    masks = find_state_files(checkpoint)
    missing = [path.name for path in weights if not path.is_file()]
    if not missing and not weights_only:
        missing = _missing_for_resume(checkpoint, state.world_size)
    if missing:
        return f"{_first_of(missing)}: missing. It was saved with `save_only_model`, or its deletion was interrupted."
    try:
        opened = {file.path for file in state.files}
    except CheckpointError:
        opened = set()
    read = [*weights, *masks, *_resume_files(checkpoint, state.world_size)]
    damaged = [path.name for path in read if path not in opened and _is_damaged(path)]
    return f"{_first_of(damaged)}: truncated or damaged." if damaged else None


def read_step(checkpoint: Path) -> int:
    """Returns the optimizer step of a checkpoint.

    Raises:
        ValueError: its `trainer_state.json` is missing or damaged, so that Trainer could not resume.
    """
    try:
        values = parse_json((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{_STATE} is missing or truncated: saving was interrupted.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{_STATE} is damaged: it must hold an object.")
    hints = get_type_hints(TrainerState) | {"log_history": list, "stateful_callbacks": dict}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{_STATE} is damaged, or of another version of transformers: it has the unknown {name}.")
        is_period = name in ("logging_steps", "eval_steps", "save_steps")
        if not _is_of_type(value, hints[name]) or (is_period and value <= 0):
            raise ValueError(f"{_STATE} is damaged: {name} is {reprlib.repr(value)}.")
    if not is_count(values.get("global_step")):
        raise ValueError(f"{_STATE} is damaged: global_step is {reprlib.repr(values.get('global_step'))}.")
    if not all(isinstance(log, dict) for log in values.get("log_history", [])):
        raise ValueError(f"{_STATE} is damaged: log_history must hold objects.")
    return values["global_step"]


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type. Whole and other numbers are of one type, and finite."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        kind = get_origin(kind) or kind
        if kind in (int, float):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return True
        elif isinstance(value, kind):
            return True
    return False


# In this order: one process or DDP; FSDP, whole and sharded; DeepSpeed.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", "global_step*/*optim_states.pt")
_SHARDED_WEIGHTS = ("pytorch_model_fsdp_*/.metadata", "global_step*/*model_states.pt")
# The files of one process, with the patterns above; those of random numbers are one for each rank.
_RESUMED = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "global_step*/*_states.pt")
_RNG_STATE = re.compile(r"rng_state_(0|[1-9][0-9]{,9})\.pth")


def _missing_for_resume(checkpoint: Path, world_size: int | None) -> list[str]:
    """Returns the missing files, or patterns of files, of optimizer, learning rate scheduler and random numbers."""
    optimizers = [sorted(checkpoint.glob(pattern)) for pattern in _OPTIMIZERS]
    missing = [] if any(optimizers) else [_OPTIMIZERS[0]]
    deepspeed = optimizers[-1]
    if deepspeed:
        # A DeepSpeed engine that steps the learning rate scheduler itself writes no scheduler.pt.
        missing += [f"{_OPTIMIZERS[-1]} of {world_size} processes"] * (len(deepspeed) < (world_size or 1))
        missing += ["latest"] * (not (checkpoint / "latest").is_file())
    elif not (checkpoint / "scheduler.pt").is_file():
        missing.append("scheduler.pt")
    return missing + _missing_rng_states(checkpoint, world_size)


def _missing_rng_states(checkpoint: Path, world_size: int | None) -> list[str]:
    if world_size is None or world_size == 1:
        name = "rng_state.pth" if world_size else "rng_state*.pth"
        return [] if any(checkpoint.glob(name)) else [name]
    count = sum(1 for _ in _rng_states(checkpoint, world_size))
    # The number is that of a file, which may be damaged: it is not counted up to.
    return [f"rng_state_*.pth of {world_size - count} of {world_size} processes"] * (count < world_size)


def _rng_states(checkpoint: Path, world_size: int) -> Iterator[Path]:
    for path in sorted(checkpoint.glob("rng_state_*.pth")):
        match = _RNG_STATE.fullmatch(path.name)
        if match and int(match[1]) < world_size:
            yield path


def _resume_files(checkpoint: Path, world_size: int | None) -> list[Path]:
    """Returns the files of optimizer, learning rate scheduler, loss scaler and random numbers."""
    paths = [path for pattern in _RESUMED for path in sorted(checkpoint.glob(pattern))]
    single = [checkpoint / "rng_state.pth"] if (checkpoint / "rng_state.pth").is_file() else []
    if world_size is None:
        return [*paths, *single, *_rng_states(checkpoint, 2**31)]
    return [*paths, *(single if world_size == 1 else _rng_states(checkpoint, world_size))]


def _weight_files(checkpoint: Path) -> list[Path]:
    """Returns the weight files that the checkpoint has or, by its index, should have.

    Where there are several, these are the ones that Trainer reads: safetensors before pickle, then adapters.

    Raises:
        ValueError: an index is damaged.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole, index = checkpoint / f"{stem}{suffix}", checkpoint / f"{stem}{suffix}.index.json"
        paths = [whole] if whole.is_file() else []
        if index.is_file():
            paths += read_weight_index(index)
        if paths:
            return paths
    folders = [checkpoint, *(path for path in sorted(checkpoint.iterdir()) if path.is_dir())]
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if paths := [folder / name for folder in folders if (folder / name).is_file()]:
            return paths
    return [*checkpoint.glob("*model.safetensors"), *checkpoint.glob("*model.bin"), *checkpoint.glob("*fsdp.bin")]


def _is_damaged(path: Path) -> bool:
    """Whether a file of tensors lacks its end or cannot be opened."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt"):
                return False
        except (OSError, SafetensorError):
            return True
    return is_damaged_archive(path)
