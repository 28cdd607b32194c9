"""Finds the checkpoint to resume from: the newest one that was written completely."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .resume import CheckpointError, ResumeState
from .state_files import state_file_paths


def newest_complete_checkpoint(output_dir: str | Path, weights_only: bool = False) -> ResumeState | None:
    """Returns the newest checkpoint in `output_dir` for which `find_checkpoint_error` finds nothing; None if none."""
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*"))
    for step in sorted((int(match[1]) for match in matches if match), reverse=True):
        state = ResumeState(Path(output_dir) / f"checkpoint-{step}")
        if find_checkpoint_error(state, weights_only) is None:
            return state
    return None


def find_checkpoint_error(state: ResumeState, weights_only: bool = False) -> str | None:
    """Returns why a checkpoint is incomplete; None if it is complete.

    Trainer writes `trainer_state.json` last: a checkpoint whose saving was interrupted has none or a truncated one.
    A checkpoint whose deletion was interrupted lacks other files. A rank may have been slower than the one that
    writes `trainer_state.json`, so the files of each rank are looked for too. Missing masks are not an error here.

    Args:
        state: the checkpoint.
        weights_only: whether the run saves without its optimizer (`save_only_model`).
    """
    checkpoint = state.checkpoint
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is missing or truncated: saving was interrupted."
    if re.fullmatch(r"checkpoint-\d+", checkpoint.name) and checkpoint.name != f"checkpoint-{step}":
        return f"trainer_state.json is of step {step}."
    weights = _weight_files(checkpoint)
    if not weights and not any(any(checkpoint.glob(pattern)) for pattern in _SHARDED_WEIGHTS):
        return "it holds no weights."
    missing = [path.name for path in [*weights, *state_file_paths(checkpoint)] if not path.is_file()]
    if not missing and not weights_only:
        missing = _missing_for_resume(checkpoint, state.world_size)
    if missing:
        return f"{', '.join(missing)}: missing. It was saved with save_only_model, or its deletion was interrupted."
    try:
        opened = {file.path for file in state.files}
    except CheckpointError:
        opened = set()
    truncated = [path.name for path in sorted(checkpoint.rglob("*")) if path not in opened and _is_truncated(path)]
    return f"{', '.join(truncated)}: truncated." if truncated else None


# In this order: one process or DDP; FSDP, whole and sharded; DeepSpeed.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", "global_step*/*optim_states.pt")
_SHARDED_WEIGHTS = ("pytorch_model_fsdp_*/.metadata", "global_step*/*model_states.pt")


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
    names = [f"rng_state_{rank}.pth" for rank in range(world_size or 0)]
    if world_size is None or world_size == 1:
        names = ["rng_state.pth" if world_size else "rng_state*.pth"]
    return missing + [name for name in names if not any(checkpoint.glob(name))]


def _weight_files(checkpoint: Path) -> list[Path]:
    """Returns the weight files that the checkpoint has or, by its index, should have."""
    for index in checkpoint.glob("*.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [checkpoint / name for name in sorted(set(shards))]
    return [*checkpoint.glob("*model.safetensors"), *checkpoint.glob("*model.bin")]


def _is_truncated(path: Path) -> bool:
    """Whether a file of tensors lacks its end. Hidden files are leftovers that are never read."""
    if path.suffix == ".safetensors" and not path.name.startswith("."):
        try:
            with safe_open(str(path), framework="pt"):
                return False
        except (OSError, SafetensorError):
            return True
    # torch.save writes zip files, whose directory is at the end.
    return path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)
