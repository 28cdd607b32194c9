"""OneshotConfig: what to prune without training, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from ..criteria import CRITERIA, Criterion
from ..methods import create_from_options
from ..patterns import Pattern
from ..registry import format_options, format_value
from ..requires import Requires
from ..solvers import SOLVERS, Solver
from .base import FLAG, PruningOptions, mappings, option
from .distillation import DistillationOptions
from .options import DEFAULT_SOLVER, merge_group_options
from .penalty import PenaltyOptions
from .pruning import PruningConfig
from .quality import QUALITIES, RUN_OPTIONS, preset_options
from .reconstruction import Reconstruction
from .schedule import ScheduleOptions
from .validation import choice_error, is_n_of_m, oneshot_errors, pattern_of


ACTIVATIONS = ("device", "cpu", "disk")
ON_UNREACHED = ("error", "magnitude")


@dataclass
class OneshotConfig(PruningOptions):
    """What to prune without training, and how.

    Without a criterion and a solver the criterion is Wanda. With solver "sparsegpt" alone, SparseGPT selects the
    pruned weights itself; with both, the criterion selects and SparseGPT updates the remaining weights. Neurons and
    heads are selected by their fluctuation, and least squares updates the matrices that read them. A `quality` chooses
    tested values for the options that are not given, once, when the config is made.

    Raises:
        PruningConfigError: with every error found.

    Example:
        >>> OneshotConfig(target_sparsity=0.5, solver="sparsegpt", solver_kwargs={"dampening": 0.1}).solver_kwargs
        {'dampening': 0.1}
        >>> OneshotConfig(target_sparsity=0.5, solver="sparsegpt", scope="global")
        Traceback (most recent call last):
        ...
        hf_sparse.config.base.PruningConfigError: `scope` is "global", but `solver` "sparsegpt" selects within a \
layer: use `scope="layer"`, or name a criterion, as in `criterion="wanda"`.

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023; Frantar &
    Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """

    quality: str | None = option(
        "Preset for the options that are not given: fast (the default; Wanda), good (SparseGPT), or best (the most "
        "accurate known methods, several times slower)."
    )
    solver: Solver | str | None = option(
        "Weight update after pruning: none (the remaining weights stay unchanged), sparsegpt (compensates the error), "
        "admm (lower error, slower), lstsq (least squares for whole columns, with the bias), or a registered one. "
        "Default: lstsq for neurons and heads, else none."
    )
    solver_kwargs: dict[str, Any] | str | None = option(
        'Options of the solver, as JSON: {"dampening": 0.01, "block_size": 128} for sparsegpt, {"iterations": '
        '30, "rho": 0.1, "dampening": 0.01} for admm, {"ridge": 0.1} for lstsq.'
    )
    swaps: int | None = option(
        "Mask refinement (SparseSwaps): maximum number of swaps of a kept and a pruned weight per row, made after the "
        "criterion's selection while they lower the output error. For single weights and N:M; 25 gives most of the "
        "gain. Default: 0, none."
    )
    permute: bool | None = option(
        "For N:M patterns: first reorder the neurons of feed-forward networks and the value channels of heads, so "
        "that N:M keeps the most. The preceding layers absorb the order; nothing is added to the model.",
        **FLAG,
    )
    layer_sparsity: dict[str, Any] | str | None = option(
        'Sparsity per layer, as JSON: {"*.q_proj": 0.4, "*.mlp.*": 0.6}; names are globs, or regular expressions '
        "after re:. No other layer is pruned."
    )
    sequential: bool | None = option(
        "Pruning order: true (the default) prunes block by block, each on inputs computed by the pruned blocks before "
        "it; false prunes all layers at once, on inputs of the dense model.",
        nargs="?",
        const=True,
    )
    forwards: int | None = option(
        "Forward passes per block: 2 observes the inputs, then recomputes the outputs of the pruned block; 1 does "
        "both in one pass, with all calibration data in one batch, and prunes each layer when its inputs arrive. "
        "Default: 1 for neurons and heads if all batches have one length, without reconstruct; else 2."
    )
    activations: str | None = option(
        "Where block outputs are stored: cpu (the default), disk (TMPDIR), or device (where they are computed)."
    )
    reconstruct: bool | None = option(
        "Tune the remaining weights, biases and norms of each block after pruning, to reproduce the outputs of the "
        "dense model on the calibration data. Takes several times as long.",
        **FLAG,
    )
    reconstruct_kwargs: dict[str, Any] | str | None = option(
        'Options of reconstruct, as JSON: {"steps": 300, "samples": 16, "window": 3, "learning_rate": 0.01}.'
    )
    on_unreached: str | None = option(
        "What to do with experts that no calibration token reaches: error (the default), or magnitude (prune them by "
        "magnitude)."
    )

    defaults: ClassVar[dict[str, Any]] = PruningOptions.defaults | {
        "swaps": 0,
        "sequential": True,
        "activations": "cpu",
        "permute": False,
        "reconstruct": False,
        "on_unreached": "error",
    }
    run_options: ClassVar[tuple[str, ...]] = (
        *PruningOptions.run_options,
        "quality",
        "layer_sparsity",
        "sequential",
        "forwards",
        "activations",
        "reconstruct",
        "reconstruct_kwargs",
        "on_unreached",
    )

    def _fill_presets(self) -> None:
        self._preset: dict[str, Any] = {}
        if self.quality not in QUALITIES:
            return
        usual = {"pattern": self.defaults["pattern"]}
        shared = usual | {name: value for name, value in self._values().items() if value is not None}
        if not isinstance(self.groups, Mapping) or not self.groups:
            self._preset |= self._preset_options(shared)
            for name, value in self._preset.items():
                setattr(self, name, value)
            return
        groups = [group for group in self.groups.values() if isinstance(group, dict)]
        presets = [self._preset_options(merge_group_options(shared, group)) for group in groups]
        for group, preset in zip(groups, presets, strict=True):
            self._preset |= preset
            group |= {name: value for name, value in preset.items() if name in self.group_options()}
        for name in RUN_OPTIONS:
            if presets and all(name in preset for preset in presets):
                setattr(self, name, presets[0][name])

    def _preset_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the preset adds to those of a group; none where its pattern is unknown."""
        pattern, criterion = pattern_of(SimpleNamespace(**given)), given.get("criterion")
        if pattern is None:
            return {}
        known = criterion if isinstance(criterion, str) and criterion in CRITERIA else None
        scope = None if known is None else self.criterion_scope(CRITERIA[known])
        return preset_options(str(self.quality), pattern, given, scope)

    def _errors(self) -> list[str]:
        errors = self._take_layer_sparsity() if self.layer_sparsity is not None else []
        errors += super()._errors()
        if type(self.forwards) is int and self.forwards not in (1, 2):
            errors.append(f"`forwards` is {format_value(self.forwards)}: it must be 1 or 2.")
        if self.forwards == 1 and any(values.get("permute") for values in (self._values(), *mappings(self.groups))):
            errors.append(
                "`forwards=1` prunes while data passes through, and `permute` needs its end: use `forwards=2`."
            )
        if self.forwards == 1 and self.sequential is False:
            errors.append(
                "`forwards=1` prunes while data passes through, and `sequential=False` does not: choose one."
            )
        errors += self._reconstruct_errors()
        choices = {"activations": ACTIVATIONS, "on_unreached": ON_UNREACHED}
        choices |= {} if self.quality is None else {"quality": QUALITIES}
        found = (choice_error(name, getattr(self, name), allowed) for name, allowed in choices.items())
        errors += [error for error in found if error]
        return errors + (self._preset_note(errors) if errors else [])

    def _preset_note(self, errors: Sequence[str]) -> list[str]:
        """Where an error is about an option that the preset has set, a line that says so."""
        text = " ".join(error for error in errors if "unknown option" not in error)  # those list all options
        chosen = [f'`{name}="{value}"`' for name, value in self._preset.items() if name in text]
        return (
            [(f'`quality` "{self.quality}" sets {", ".join(chosen)}: give others, or leave it out.')] if chosen else []
        )

    def _reconstruct_errors(self) -> list[str]:
        """The errors of options that are reconstruct's own, or do not go with it."""
        if not self.reconstruct:
            given = format_value(self.reconstruct_kwargs)
            unused = f"`reconstruct_kwargs` is {given}, but `reconstruct` is off: turn it on, or leave them out."
            return [unused] if self.reconstruct_kwargs else []
        errors = []
        if self.sequential is False:
            errors.append("`reconstruct` tunes block by block, and `sequential=False` does not: choose one.")
        if self.forwards == 1:
            errors.append("`reconstruct` tunes a block between two forwards: use `forwards=2`, or leave it out.")
        try:
            self.reconstruction  # noqa: B018 - raises if an option is invalid
        except ValueError as error:
            errors.append(f"`reconstruct_kwargs`: {error}.")
        except TypeError:
            pass  # reported as an option of the wrong type
        return errors

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The options of reconstruct; None if it is off."""
        if not self.reconstruct:
            return None
        options = self.reconstruct_kwargs or {}
        if not isinstance(options, Mapping):
            raise TypeError(f"`reconstruct_kwargs` is {format_value(options)}: it must be a mapping.")
        return create_from_options(Reconstruction, options, "`reconstruct`", "reconstruct_kwargs")

    def _take_layer_sparsity(self) -> list[str]:
        """Replaces each entry by a group."""
        given, self.layer_sparsity = self.layer_sparsity, None
        if not isinstance(given, Mapping):
            return [f"`layer_sparsity` is {format_value(given)}: it must be a mapping of names to sparsities."]
        options = ("groups", "targets", "target_sparsity")
        clashes = [name for name in options if getattr(self, name) not in (None, self.defaults.get(name))]
        if clashes:
            return [f"`layer_sparsity` names the layers and their sparsities: leave {format_options(clashes)} out."]
        self.groups = {name: {"targets": [name], "target_sparsity": share} for name, share in given.items()}
        return []

    def more_errors(self, options: SimpleNamespace, criterion: str | None) -> list[str]:
        return oneshot_errors(options, criterion, self.resolve_solver(options))

    @classmethod
    def ignores_scope(cls, options: SimpleNamespace) -> bool:
        return is_n_of_m(options.pattern) and not options.keep_zeros

    @classmethod
    def _drop_foreign(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        schedule = set(ScheduleOptions.__annotations__) - {"schedule_defaults"}
        schedule |= {
            field.name for kind in (DistillationOptions, PenaltyOptions) for field in dataclasses.fields(kind)
        }
        defaults = ScheduleOptions.schedule_defaults | DistillationOptions.distillation_defaults
        given = {
            name: values[name] for name in schedule & values.keys() if values[name] not in (None, defaults.get(name))
        }
        if given:
            names = ", ".join(f"`{name}` ({value!r})" for name, value in sorted(given.items()))
            raise ValueError(f"{where}one-shot pruning has a single prune step and does not train: remove {names}.")
        return {name: value for name, value in values.items() if name not in schedule}

    @property
    def prefers_single_forward(self) -> bool:
        """Whether one forward observes inputs and propagates, if all batches have one length."""
        if self.forwards is not None or self.reconstruct:
            return self.forwards == 1
        return bool(self.sequential) and all(
            group.pattern.coupled_kind is not None for group in self.resolve_groups().values() if group.target
        )

    @classmethod
    def of(cls, config: PruningOptions) -> OneshotConfig:
        """Returns a one-shot config with the options of any config.

        Raises:
            PruningConfigError: the config has a schedule, which one-shot pruning cannot follow.
            TypeError: it is no config.
        """
        if not isinstance(config, PruningOptions):
            raise TypeError(f"one-shot pruning takes a OneshotConfig or a PruningConfig, not {format_value(config)}.")
        return config if isinstance(config, cls) else cls.from_dict(PruningConfig.to_dict(config))

    def resolve_criterion(self, options: SimpleNamespace) -> str | None:
        solver, pattern = self.resolve_solver(options), pattern_of(options)
        selects = solver in SOLVERS and SOLVERS[solver].selects and (pattern is None or pattern.coupled_kind is None)
        default = Pattern.oneshot_criterion if pattern is None else pattern.oneshot_criterion
        return options.criterion or (None if selects else default)

    def criterion_scope(self, criterion: Criterion | type[Criterion]) -> str:
        # Gradients measure the loss, in one unit for all layers. Other scores have scales that differ between layers,
        # and no training makes up for a layer that loses too much.
        scope = criterion.default_scope
        return "layer" if scope == "global" and not criterion.requires & Requires.GRADIENTS else scope

    def resolve_solver(self, options: SimpleNamespace) -> str:
        pattern = pattern_of(options)
        return options.solver or (DEFAULT_SOLVER if pattern is None else pattern.oneshot_solver)
