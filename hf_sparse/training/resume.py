"""ResumeState: the pruning state of a checkpoint, read once, verified once, and applied to the pruner of a new run."""

from __future__ import annotations

import copy
import logging
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import PruningConfig, ResolvedGroup
from ..config.options import EARLIER_DEFAULTS
from ..distributed import get_communicator
from ..engine.parameter_group import ParameterGroup
from ..engine.pruner import Pruner
from ..engine.saved_state import check_saved_state, is_count
from ..files import STATE_FILE, TUNING_FILE, open_tensors, parse_json
from ..schedulers import PruningSchedule
from .algorithm_run import AlgorithmRun
from .rewinding import Rewinding, check_rewind_description
from .state_files import (
    FORMAT_VERSION,
    IN_STEPS,
    METADATA_KEY,
    changed_options,
    checksum,
    compared_options,
    find_state_files,
)
from .tuning import Tuning
from .tuning.state_file import TuningState
from .tuning.tuner import Tuner


logger = logging.getLogger(__name__)

_FIELDS = {"shapes", "boxes", "counters", "config", "step", "processes", "checksum"}
_MAX_PROCESSES = 2**31 - 1


class CheckpointError(ValueError):
    """A checkpoint that a pruning run cannot resume from: what is wrong, and the remedy."""


@dataclass(frozen=True)
class StateFile:
    """An open state file: tensors that are read when they are asked for, and the JSON values that describe them."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    values: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> StateFile:
        """Opens a state file and checks its description.

        Raises:
            CheckpointError: the file is damaged, of another program, or of a later version of this package.
        """
        try:
            tensors, metadata = open_tensors(path)
            values = parse_json(metadata[METADATA_KEY])
            _check_description(values, path)
            return cls(path, tensors, values)
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        except KeyError as error:
            raise _damaged(path, f"it lacks the metadata {error}") from error

    def verify(self) -> None:
        """Compares the checksum.

        Raises:
            CheckpointError: it differs, or a tensor cannot be read.
        """
        values = {name: value for name, value in self.values.items() if name != "checksum"}
        try:
            computed = checksum(self.tensors, values)
        except (OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from error
        if self.values["checksum"] != computed:
            raise _damaged(self.path, "its checksum is not the one saved with it")


def _check_description(values: Any, path: Path) -> None:
    """Checks the JSON description of a state file. Raises ValueError, or CheckpointError for a later version."""
    if not isinstance(values, dict):
        raise ValueError(f"its description is {reprlib.repr(values)}")
    version = values.get("version", 0)
    if not is_count(version):
        raise ValueError(f"its version is {reprlib.repr(version)}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by a later version of hf_sparse: its format is {version}, and this version reads up "
            f"to {FORMAT_VERSION}. Upgrade hf_sparse, or start a new run from the weights with `keep_zeros=True`."
        )
    if missing := _FIELDS - values.keys():
        raise ValueError(f"its description is incomplete: it lacks {', '.join(sorted(missing))}")
    check_saved_state(values)
    check_rewind_description(values)
    if not is_count(values["step"]):
        raise ValueError(f"its step is {reprlib.repr(values['step'])}")
    processes = values["processes"]
    if not is_count(processes) or not 1 <= processes <= _MAX_PROCESSES:
        raise ValueError(f"its number of processes is {reprlib.repr(processes)}")
    for name in ("config", "algorithm", "defaults"):
        if not isinstance(values.get(name, {}), dict):
            raise ValueError(f"its {name} is {reprlib.repr(values[name])}")


def _damaged(path: Path, problem: Exception | str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or was not written by hf_sparse: {problem}. Resume from an earlier checkpoint."
    )


class ResumeState:
    """The pruning state of a checkpoint, saved by any number of ranks: masks, statistics and compared options.

    In one `train` each state file is opened once and its checksum is verified once. Parameter groups are resolved
    twice: before training starts, to validate the state before any weight changes, and for the `Pruner`, on the
    parameters as wrapping has left them. With a stock Trainer, which does not announce the checkpoint, they are
    resolved once, for the `Pruner`.

    Args:
        checkpoint: the folder. It is not read before its state is asked for.

    Example:
        >>> ResumeState("no/such/folder").world_size is None
        True
    """

    def __init__(self, checkpoint: str | Path):
        self.checkpoint = Path(checkpoint)
        self._is_verified = False

    @cached_property
    def files(self) -> list[StateFile]:
        """The open state files, one for each rank that has written one.

        Raises:
            CheckpointError: a file is missing, truncated or of another program, or there is none.
        """
        try:
            paths = find_state_files(self.checkpoint)
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint}: {error} Resume from another checkpoint.") from error
        if not paths:
            raise CheckpointError(
                f"{self.checkpoint} holds no masks ({STATE_FILE}): it was not saved by a pruning run. Resume from a "
                "checkpoint that was, or start a new run from its weights with `model_name_or_path` (and "
                "`keep_zeros=True` to lock the zeros they have)."
            )
        return [StateFile.open(path) for path in paths]

    @cached_property
    def tuning(self) -> TuningState | None:
        """The state of the tuning; None if all parameters were trained.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return TuningState.open(self.checkpoint)
        except (OSError, ValueError) as error:
            raise _damaged(self.checkpoint / TUNING_FILE, error) from error

    @property
    def world_size(self) -> int | None:
        """The number of ranks of the run that wrote the checkpoint; None if its state cannot be read."""
        try:
            return self.files[0].values["processes"]
        except CheckpointError:
            return None

    def with_its_defaults(self, config: PruningConfig) -> PruningConfig:
        """Returns the config of a run, with the earlier default of each option that has its present default, where the
        checkpoint has the earlier one: its masks belong to the weights that this selects.

        Raises:
            CheckpointError: the state is missing or damaged.
        """
        saved = self.files[0].values.get("defaults", EARLIER_DEFAULTS)  # earlier versions have not written any
        changed = {
            name: earlier
            for name, earlier in EARLIER_DEFAULTS.items()
            if saved.get(name) == earlier and getattr(config, name) == config.defaults[name] != earlier
        }
        if not changed:
            return config
        config = copy.copy(config)
        for name, earlier in changed.items():
            setattr(config, name, copy.copy(earlier))
        text = ", ".join(f"`{name}={earlier!r}`" for name, earlier in changed.items())
        logger.warning("resuming with the options of %s: %s.", self.checkpoint, text)
        return config

    def verify(self, step: int | None = None) -> None:
        """Compares the checksum of each file, once. Ranks share the work where there are several files.

        Args:
            step: the optimizer step of the weights; None if it is not known.

        Raises:
            CheckpointError: a file was changed or damaged after it was written, or is of another step.
        """
        for file in self.files:
            if step is not None and file.values["step"] != step:
                raise CheckpointError(
                    f"the masks in {file.path} are of step {file.values['step']}, its weights of step {step}."
                )
        if self._is_verified:
            return
        if self.tuning is not None:
            try:
                self.tuning.verify(step)
            except ValueError as error:
                raise _damaged(self.tuning.path, error) from error
        communicator = get_communicator()
        for file in self.files if len(self.files) == 1 else self.files[communicator.rank :: communicator.world_size]:
            file.verify()
        self._is_verified = True

    def validate(
        self,
        groups: Iterable[ResolvedGroup | ParameterGroup],
        config: PruningConfig,
        schedule: PruningSchedule | None = None,
        step: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Checks that the state is undamaged and fits the run. It changes nothing.

        Args:
            groups: the parameter groups of the run, with their layers.
            config: its options.
            schedule: its pruning schedule; None while the number of training steps is not known.
            step: the optimizer step of the weights; None if it is not known.
            tuning: what is trained; None for all parameters.

        Raises:
            CheckpointError: the state is missing or damaged, or belongs to other weights, another step or another
                config; then each option that differs is named.
        """
        self.verify(step)
        shapes = {name: list(shape) for group in groups for name, shape in group.parameter_shapes.items()}
        options = compared_options(config, schedule)
        for file in self.files:
            self._compare_shapes(file, shapes)
            changes = changed_options(file.values["config"], options)
            if changes:
                raise CheckpointError(
                    f"the pruning config differs from that of {file.path}: {'; '.join(changes)}. Resume with "
                    f"the saved values, or start a new run from its weights.{_steps_remedy(changes)}"
                )

        self._compare_tuning(tuning)

    def _compare_tuning(self, tuning: Tuning | None) -> None:
        remedy = "Resume with the saved values, or start a new run from its weights."
        if (tuning is None) != (self.tuning is None):
            saved, now = ("without `tune`", "with it") if self.tuning is None else ("with `tune`", "without")
            raise CheckpointError(f"{self.checkpoint} was saved by a run {saved}, and this run is {now}. {remedy}")
        if tuning is not None and self.tuning is not None and (change := self.tuning.difference(tuning)):
            raise CheckpointError(f"the tuning differs from that of {self.tuning.path}: {change}. {remedy}")

    def start_tuner(self, tuner: Tuner) -> None:
        """Gives the updates of weights to a tuner.

        Raises:
            CheckpointError: they do not fit the weights.
        """
        try:
            tuner.start(self.tuning)
        except ValueError as error:
            raise CheckpointError(
                f"{self.checkpoint / TUNING_FILE}: {error}. Resume from another checkpoint."
            ) from error

    @staticmethod
    def _compare_shapes(file: StateFile, selected: dict[str, list[int]]) -> None:
        saved = file.values["shapes"]
        differing = sorted(name for name in saved.keys() | selected.keys() if saved.get(name) != selected.get(name))
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"the masks in {file.path} belong to other weights than this run selects: {len(differing)} "
                f'differ, such as "{name}" (saved {saved.get(name)}, selected {selected.get(name)}). Use the same '
                "model, `targets` and `exclude`."
            )

    def apply(self, pruner: Pruner, run: AlgorithmRun, rewinding: Rewinding | None = None) -> None:
        """Gives the masks and statistics to a pruner, its state to the run of the algorithm, and the weights to rewind
        to, each rank its part.

        Raises:
            CheckpointError: they do not fit the weights.
        """
        try:
            states = [(file.tensors, file.values) for file in self.files]
            pruner.load_state_dict(*states)
            run.load(lambda kind: pruner.load_tensors(kind, *states), self.files[0].values.get("algorithm", {}))
            if rewinding is not None:
                rewinding.load(states, self.files[0].values["step"])
        except (ValueError, KeyError) as error:
            first, *others = [file.path for file in self.files]
            where = f"{first} and {len(others)} more" if others else first
            raise CheckpointError(f"{where}: {error} Resume from another checkpoint.") from error


def _steps_remedy(changes: list[str]) -> str:
    """Returns how to give the saved numbers of steps, if they are among the `changed_options`."""
    if not any(change.partition(":")[0].endswith(IN_STEPS) for change in changes):
        return ""
    return (
        " `prune_start`, `prune_end` and `prune_every` take these step numbers in place of fractions: a fraction "
        "means another step where the number of training steps is another one, which must be at least `prune_end`."
    )


def keep_pruned(previous: Pruner, pruner: Pruner) -> None:
    """Carries the masks of an earlier `train` over to the pruner of the next one, so that pruned weights stay pruned.
    Weights that were replaced, reset or sharded differently in between start without masks. All ranks call this."""
    if pruner.communicator.any(not _holds_same_zeros(previous, pruner)):
        return
    for name in pruner.shards:
        pruner.masks.replace(name, previous.masks[name] & pruner.masks[name])


def _holds_same_zeros(previous: Pruner, pruner: Pruner) -> bool:
    """Whether the shards of this rank are the previous ones, and all that was pruned in them is still zero."""
    if previous.shards.keys() != pruner.shards.keys():
        return False
    for name, shard in pruner.shards.items():
        bits, weight = previous.masks.bits(name), shard.tensor
        if previous.shards[name].local_regions != shard.local_regions or bits.shape != weight.shape:
            return False
        if torch.count_nonzero(weight[bits.to(weight.device) == 0]):
            return False
    return True
