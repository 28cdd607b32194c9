"""The pruning files beside the weights, and which checkpoint of a run can be trusted."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

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
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} holds no masks ({STATE_FILE}): it was not saved by a pruning run. Resume from a checkpoint "
            "that was, or start a new run from its weights with model_name_or_path (and keep_zeros=True to lock the "
            "zeros they have)."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or foreign: {error}. Resume from an earlier checkpoint.") from error
    return tensors, values


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
            f'"{name}" (saved {saved_shapes.get(name)}, selected {shapes.get(name)}). Use the same model, targets '
            "and exclude."
        )
    saved, wanted = values["config"], _identity(pruner.config, cadence)
    changes = [f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in wanted.items() if saved.get(key) != value]
    if changes:
        raise CheckpointError(
            f"the pruning config differs from that of {directory}: {'; '.join(changes)}. Resume with the saved values, "
            "or start a new run from its weights."
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
    identity = {name: value for name, value in config.to_dict().items() if name not in _RESOLVED}
    if cadence is not None:
        steps = {"prune_start": cadence.start, "prune_end": cadence.end, "prune_every": cadence.every}
        identity |= {f"{name} (steps)": value for name, value in steps.items()}
    return json.loads(json.dumps(identity))


# Which checkpoint can be trusted


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, or None.

    Trainer writes `trainer_state.json` last, so a checkpoint whose saving was cut off has none, or half of one.
    """
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*"))
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    complete = (Path(output_dir) / f"checkpoint-{step}" for step in steps)
    return next((str(path) for path in complete if is_complete(path)), None)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether everything in a checkpoint can be opened, and its state is that of the step in its name."""
    checkpoint = Path(checkpoint)
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if f"checkpoint-{state['global_step']}" != checkpoint.name:
            return False
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(str(path), framework="pt"):
                pass
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    # torch.save writes zip files, whose directory comes last.
    return all(zipfile.is_zipfile(path) for pattern in ("*.pt", "*.pth") for path in checkpoint.glob(pattern))
