"""OneshotConfig: PruningConfig and what one-shot pruning needs to know beyond it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from ..registry import nearest
from .pruning import OPTIONS, PruningConfig, PruningConfigError, option
from .validation import oneshot_errors


ON_UNREACHED = ("error", "magnitude")


@dataclass
class OneshotConfig(PruningConfig):
    """What to prune, by which measure and in which shape, without training.

    Without a criterion and a solver it is Wanda; with solver "sparsegpt" alone it is SparseGPT, which chooses by
    itself; with both, the criterion chooses and SparseGPT makes up for what falls. Options of when to prune have no
    effect.

    Raises:
        PruningConfigError: with every fault found.

    Example:
        >>> OneshotConfig(target_sparsity=0.5, solver="sparsegpt", scope="global")
        Traceback (most recent call last):
        ...
        hf_sparse.config.pruning.PruningConfigError: the pruning config has 1 fault:
          - scope is "global", but solver "sparsegpt" chooses within a layer: use scope=layer, or name a criterion, \
as in criterion="wanda".

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023; Frantar &
    Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """

    layer_sparsity: dict[str, Any] | str | None = option(
        None,
        'Sparsity of each layer, as {"*.q_proj": 0.4, "*.mlp.*": 0.6}: globs, or regular expressions after re:. '
        "Nothing else is pruned.",
    )
    sequential: bool = option(
        True,
        "Prune block by block, each from inputs that went through the pruned blocks before it. False: all layers at "
        "once, from inputs in the dense model.",
    )
    forwards: int = option(
        2,
        "2 runs each block twice, to see its inputs and to pass on what it gives when pruned; 1 runs it once, over "
        "all calibration data in one batch, and prunes each layer as its inputs come.",
    )
    dampening: float = option(
        0.01,
        "For solver sparsegpt: share of the mean square of the inputs that is added to each, from 0 to 1. It stands "
        "for what too little calibration data does not show.",
    )
    solver_block: int | None = option(
        None,
        "For solver sparsegpt: columns of a weight that choose together. Left out: 128, or an eighth of them if that "
        "is less.",
    )
    activations: str = option(
        "cpu", "Where outputs of blocks are kept: cpu, disk (TMPDIR), or device, where they are computed."
    )
    on_unreached: str = option(
        "error", "What to do with an expert that no calibration token reaches: error, or magnitude."
    )

    def __post_init__(self):
        errors: list[str] = []
        if self.pruning_config is not None:
            self._take_recipe(errors)
        if isinstance(self.layer_sparsity, str):
            self._parse_layer_sparsity(errors)
        if self.layer_sparsity:
            errors += self._take_layer_sparsity()
        try:
            super().__post_init__()
        except PruningConfigError as error:
            errors += error.errors
        errors += self._own_errors()
        if not errors:
            for name, group in self.resolve_groups(oneshot=True).items():
                where = f'group "{name}": ' if self.groups else ""
                errors += [where + error_text for error_text in oneshot_errors(group)]
        if errors:
            raise PruningConfigError(errors)

    def _parse_layer_sparsity(self, errors: list[str]) -> None:
        try:
            self.layer_sparsity = json.loads(self.layer_sparsity)
        except json.JSONDecodeError as error:
            errors.append(f"layer_sparsity is no JSON object: {error}.")
            self.layer_sparsity = None

    def _take_layer_sparsity(self) -> list[str]:
        """Each entry becomes a group."""
        given = self.layer_sparsity
        if not isinstance(given, dict):
            return [f"layer_sparsity is {given!r}: it must be a mapping of names to shares."]
        clashes = [name for name in ("groups", "targets", "target_sparsity") if getattr(self, name) is not None]
        if clashes:
            return [f"layer_sparsity says itself what is pruned and how far: leave {', '.join(clashes)} out."]
        self.groups = {name: {"targets": [name], "target_sparsity": share} for name, share in given.items()}
        self.layer_sparsity = None
        return []

    def _own_errors(self) -> list[str]:
        errors = []
        if self.forwards not in (1, 2):
            errors.append(f"forwards is {self.forwards}: it must be 1 or 2.")
        if self.forwards == 1 and not self.sequential:
            errors.append("forwards=1 prunes while data passes through, and sequential=False does not: choose one.")
        if not isinstance(self.dampening, (int, float)) or not 0 <= self.dampening <= 1:
            errors.append(f"dampening is {self.dampening}: it must be a number from 0 to 1, as in 0.01.")
        if self.solver_block is not None and (not isinstance(self.solver_block, int) or self.solver_block < 1):
            errors.append(f"solver_block is {self.solver_block}: it must be a whole number, 1 or more.")
        for name, allowed in (("activations", PLACES), ("on_unreached", ON_UNREACHED)):
            value = getattr(self, name)
            if value not in allowed:
                errors.append(f'{name} is "{value}": it must be {" or ".join(allowed)}.{nearest(str(value), allowed)}')
        return errors

    @classmethod
    def options(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, config: PruningConfig) -> OneshotConfig:
        """A one-shot config with the options of any config."""
        return config if isinstance(config, cls) else cls(**{name: getattr(config, name) for name in OPTIONS})

    def to_dict(self) -> dict[str, Any]:
        """All options and their values."""
        own = [name for name in self.options() if name not in (*OPTIONS, "layer_sparsity")]
        return super().to_dict() | {name: getattr(self, name) for name in own}


PLACES = ("device", "cpu", "disk")
