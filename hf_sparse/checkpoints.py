"""The pruning files beside the weights, and which checkpoint of a run can be trusted."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .config import PruningConfig
from .pruner import Pruner
from .schedulers import Cadence
from .storage import read_tensors, write_tensors


STATE_FILE = "pruning_state.safetensors"
CONFIG_FILE = "pruning_config.json"
REPORT_FILE = "pruning_report.json"

# Options that act through something else which is compared: the cadence they come to, the weights they select.
_RESOLVED = ("prune_start", "prune_end", "prune_every", "targets", "exclude")


class CheckpointError(ValueError):
    """A checkpoint that pruning cannot go on from: what is wrong, and the remedy."""


def write_state(directory: str | Path, pruner: Pruner, cadence: Cadence, step: int) -> None:
    """Write what a resumed run needs: masks, the criteria's sums, and the config to compare with."""
    tensors, values = pruner.state_dict()
    values |= {"config": _identity(pruner.config, cadence), "step": step}
    values["checksum"] = _checksum(tensors, values)
    write_tensors(Path(directory) / STATE_FILE, tensors, {"format": "pt", "hf_sparse": json.dumps(values)})


def read_state(directory: str | Path) -> tuple[dict, dict[str, Any]]:
    """The tensors and values that `write_state` wrote.

    Raises:
        CheckpointError: the file is missing, cut short, or another program's.
    """
    path = Path(directory) / STATE_FILE
    try:
        tensors, metadata = read_tensors(path)
        values = json.loads(metadata["hf_sparse"])
        if not {"shapes", "digest", "counters", "config", "step"} <= set(values):
            raise ValueError("its description is incomplete")
        if values.pop("checksum", None) != _checksum(tensors, values):
            raise ValueError("its checksum is not the one saved with it")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} holds no masks ({STATE_FILE}): it was not saved by a pruning run. Resume from a checkpoint "
            "that was, or start a new run from its weights with model_name_or_path (and keep_zeros=True to lock the "
            "zeros they have)."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or foreign: {error}. Resume from an earlier checkpoint.") from error
    return tensors, values


def _checksum(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> int:
    """One number over everything that is saved: a flipped bit changes it."""
    checksum = zlib.crc32(json.dumps(values, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def check_state(directory: str | Path, pruner: Pruner, cadence: Cadence | None, step: int | None = None) -> None:
    """See that the masks in `directory` fit the run, before anything of it changes.

    Args:
        cadence: of this run, or None while the number of training steps is not known.
        step: the optimizer step that the checkpoint must be of, if known.

    Raises:
        CheckpointError: missing, damaged or foreign masks, or another pruning config: with every field that differs.
    """
    _, values = read_state(directory)
    shapes = {name: list(weight.shape) for name, weight in pruner.parameters.items()}
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
    saved, wanted = values["config"], _identity(pruner.config, cadence)
    changes = [f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in wanted.items() if saved.get(key) != value]
    if changes:
        raise CheckpointError(
            f"the pruning config differs from that of {directory}: {'; '.join(changes)}. Resume with the saved "
            "values, or start a new run from its weights."
        )
    if step is not None and values["step"] != step:
        raise CheckpointError(f"the masks in {directory} are of step {values['step']}, its weights of step {step}.")


def restore_state(directory: str | Path, pruner: Pruner) -> None:
    """Put masks and sums back.

    Raises:
        CheckpointError: they do not fit the weights.
    """
    tensors, values = read_state(directory)
    try:
        pruner.load_state_dict(tensors, values)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: {error} Resume from another checkpoint.") from error


def _identity(config: PruningConfig, cadence: Cadence | None) -> dict[str, Any]:
    """What must be equal for a run to go on, as JSON values."""
    identity = {name: value for name, value in PruningConfig.to_dict(config).items() if name not in _RESOLVED}
    if cadence is not None:
        steps = {"prune_start": cadence.start, "prune_end": cadence.end, "prune_every": cadence.every}
        identity |= {f"{name} (steps)": value for name, value in steps.items()}
    return json.loads(json.dumps(identity))


# Which checkpoint can be trusted


def last_complete_checkpoint(output_dir: str | Path, weights_only: bool = False) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, or None. See `find_fault`."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*"))
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    checkpoints = (Path(output_dir) / f"checkpoint-{step}" for step in steps)
    return next((str(path) for path in checkpoints if find_fault(path, weights_only) is None), None)


def find_fault(checkpoint: str | Path, weights_only: bool = False) -> str | None:
    """Why a run cannot go on from `checkpoint`, or None.

    Trainer writes `trainer_state.json` last, so a checkpoint whose saving was cut off has none, or half of one; one
    whose deletion was cut off lacks other files.

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
    if not any(_weight_files(checkpoint)):
        return "it holds no weights."
    missing = [path.name for path in _weight_files(checkpoint) if not path.is_file()]
    if not weights_only:
        patterns = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
        missing += [pattern for pattern in patterns if not any(checkpoint.glob(pattern))]
    if missing:
        return f"{', '.join(missing)}: missing. It was saved with save_only_model, or its deletion was cut off."
    damaged = [path.name for path in sorted(checkpoint.iterdir()) if not _opens(path)]
    return f"{', '.join(damaged)}: cut short." if damaged else None


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
    what a killed run left half-written goes."""
    directory = Path(directory)
    (directory / "trainer_state.json").unlink(missing_ok=True)
    for leftover in directory.glob(".pruning_*"):
        leftover.unlink(missing_ok=True)
