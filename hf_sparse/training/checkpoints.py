"""Which checkpoint of a run can be trusted."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .state_files import CheckpointError, clear_states, read_states, state_files


def last_complete_checkpoint(output_dir: str | Path, weights_only: bool = False) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, or None. See `find_checkpoint_error`."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*"))
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    checkpoints = (Path(output_dir) / f"checkpoint-{step}" for step in steps)
    return next((str(path) for path in checkpoints if find_checkpoint_error(path, weights_only) is None), None)


def find_checkpoint_error(checkpoint: str | Path, weights_only: bool = False) -> str | None:
    """Why a run cannot go on from `checkpoint`, or None.

    Trainer writes `trainer_state.json` last, so a checkpoint whose saving was cut off has none, or half of one; one
    whose deletion was cut off lacks other files. Of several processes some may have been slower than the one that
    writes it, so what each of them writes is looked for too.

    Args:
        checkpoint: the folder.
        weights_only: whether the run saves without its optimizer (`save_only_model`).
    """
    checkpoint = Path(checkpoint)
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is missing or cut short: saving was cut off."
    if re.fullmatch(r"checkpoint-\d+", checkpoint.name) and checkpoint.name != f"checkpoint-{step}":
        return f"trainer_state.json is of step {step}."
    weights = _weight_files(checkpoint)
    if not weights and not any(any(checkpoint.glob(pattern)) for pattern in _SPLIT_WEIGHTS):
        return "it holds no weights."
    missing = [path.name for path in [*weights, *state_files(checkpoint)] if not path.is_file()]
    if not missing and not weights_only:
        missing = _missing_for_resume(checkpoint)
    if missing:
        return f"{', '.join(missing)}: missing. It was saved with save_only_model, or its deletion was cut off."
    damaged = [path.name for path in sorted(checkpoint.rglob("*")) if not _opens(path)]
    return f"{', '.join(damaged)}: cut short." if damaged else None


# In the order of: one process or DDP; FSDP, whole and in shards; DeepSpeed.
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*/.metadata", "global_step*/*optim_states.pt")
_SPLIT_WEIGHTS = ("pytorch_model_fsdp_*/.metadata", "global_step*/*model_states.pt")


def _missing_for_resume(checkpoint: Path) -> list[str]:
    """The files, or patterns of files, that optimizer, schedule and random numbers need."""
    found = [sorted(checkpoint.glob(pattern)) for pattern in _OPTIMIZERS]
    missing = [] if any(found) else [_OPTIMIZERS[0]]
    processes = processes_of(checkpoint)
    deepspeed = found[-1]
    if deepspeed:
        # An engine leaves no scheduler.pt when it steps its own.
        missing += [f"{_OPTIMIZERS[-1]} of {processes} processes"] * (len(deepspeed) < (processes or 1))
        missing += ["latest"] * (not (checkpoint / "latest").is_file())
    elif not (checkpoint / "scheduler.pt").is_file():
        missing.append("scheduler.pt")
    names = [f"rng_state_{rank}.pth" for rank in range(processes or 0)]
    if processes is None or processes == 1:
        names = ["rng_state.pth" if processes else "rng_state*.pth"]
    return missing + [name for name in names if not any(checkpoint.glob(name))]


def processes_of(checkpoint: str | Path) -> int | None:
    """By how many processes a checkpoint was written; None where there are no masks to say so."""
    try:
        return read_states(checkpoint)[0][1]["processes"]
    except CheckpointError:
        return None


def _weight_files(checkpoint: Path) -> list[Path]:
    """The files of weights that there are or, by their index, should be."""
    for index in checkpoint.glob("*.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [checkpoint / name for name in sorted(set(shards))]
    return [*checkpoint.glob("*model.safetensors"), *checkpoint.glob("*model.bin")]


def _opens(path: Path) -> bool:
    """Whether a file of tensors has its end. Hidden files are leftovers that nothing reads."""
    if path.suffix == ".safetensors" and not path.name.startswith("."):
        try:
            with safe_open(str(path), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False
    # torch.save writes zip files, whose directory comes last.
    return path.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(path)


def start_checkpoint(directory: str | Path) -> None:
    """Before anything of a checkpoint is written: no `trainer_state.json` of an earlier run vouches for this one, and
    what a killed run, or one of more processes, left of its masks goes."""
    directory = Path(directory)
    (directory / "trainer_state.json").unlink(missing_ok=True)
    clear_states(directory)
