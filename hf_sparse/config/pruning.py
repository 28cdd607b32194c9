"""PruningConfig: what to prune during training, and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from ..algorithms import ALGORITHMS, Algorithm
from ..patterns import get_pattern
from ..registry import format_options
from ..schedulers import PruningSchedule, Scheduler, get_scheduler
from .base import PruningOptions
from .distillation import DistillationOptions, distillation_errors
from .options import DEFAULT_SOLVER, is_whole
from .penalty import PenaltyOptions, penalty_errors
from .schedule import (
    ScheduleOptions,
    drop_unused_schedule_options,
    reaches_target_at_once,
    unused_schedule_options,
)
from .validation import is_n_of_m, target_of


@dataclass
class PruningConfig(ScheduleOptions, PenaltyOptions, DistillationOptions, PruningOptions):
    """What to prune during training, and when.

    Nothing is pruned unless `target_sparsity` is given, a pattern implies one (2:4), `groups` are, or `keep_zeros`.

    A method is selected by name, with its options in `criterion_kwargs` or `allocation_kwargs`, or given as an
    instance. Options that were not given are taken from the recipe file `pruning_config`, if there is one, or have
    their defaults.

    Raises:
        PruningConfigError: with every error found.

    Example:
        >>> from hf_sparse.criteria.snip_momentum import SnipMomentum
        >>> config = PruningConfig(target_sparsity=0.8, criterion=SnipMomentum(decay=0.95))
        >>> config.criterion, config.criterion_kwargs, config.prune_end
        ('snip_momentum', {'decay': 0.95}, 0.7)
        >>> PruningConfig(target_sparsity=1.5, criterion="magnitud")
        Traceback (most recent call last):
        ...
        hf_sparse.config.base.PruningConfigError: 2 errors in the pruning config:
        - `criterion` is "magnitud": known are block_influence, fisher, fluctuation, gradient, greedy_movement, \
magnitude, mfac, obert, obs, random, ria, snip, snip_momentum, taylor, wanda. Did you mean "magnitude"?
        - `target_sparsity` is 1.5: it must be a number from 0 to 1 (0.8 prunes 80%).
    """

    defaults: ClassVar[dict[str, Any]] = (
        PruningOptions.defaults | ScheduleOptions.schedule_defaults | DistillationOptions.distillation_defaults
    )
    run_options: ClassVar[tuple[str, ...]] = (
        *PruningOptions.run_options,
        "algorithm",
        "algorithm_kwargs",
        "prune_start",
        "prune_end",
        "prune_every",
        "rewind",
        "rewind_weights",
        *(field.name for field in dataclasses.fields(DistillationOptions)),
    )

    def _errors(self) -> list[str]:
        checked, _ = self._check_types(self._values())
        errors = [*super()._errors(), *distillation_errors(checked)]
        return errors or [*self._rewind_errors(), *self._unused_schedule_errors()]

    def _unused_schedule_errors(self) -> list[str]:
        """Returns an error for each option of when to prune that was given and has no effect."""
        values = self._values()
        given = {name for name in ("prune_end", "prune_every") if values[name] != self.defaults[name]}
        remedies = {
            "prune_end": f'use `prune_end={self.prune_start}`, or `scheduler="iterative"`.',
            "prune_every": 'leave it out, or use `scheduler="iterative"` with `prune_end` after `prune_start`.',
        }
        return [
            f"`{name}` has no effect, because the target is reached in the first prune step: {remedies[name]}"
            for name in unused_schedule_options(values)
            if name in given
        ]

    @classmethod
    def ignores_scope(cls, options: SimpleNamespace) -> bool:
        return is_n_of_m(options.pattern) and not options.keep_zeros and reaches_target_at_once(vars(options))

    @classmethod
    def read_options(cls, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        options = super().read_options(values, where)
        return drop_unused_schedule_options(options) if is_whole(options) else options

    def _rewind_errors(self) -> list[str]:
        groups = [SimpleNamespace(**values) for values in self._group_values().values() if isinstance(values, dict)]
        if self.rewind is None or any(target_of(group) for group in groups):
            return []
        return [
            "`rewind` restarts training after the last prune step, but nothing is pruned: give `target_sparsity`, as "
            "in `target_sparsity=0.8`, or leave `rewind` out."
        ]

    @classmethod
    def _drop_foreign(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        # Earlier versions had the option in both kinds of config.
        solver = values.pop("solver", None)
        if solver not in (None, DEFAULT_SOLVER):
            raise ValueError(
                f'{where}`solver` is "{solver}": weights are updated by one-shot pruning only. Remove it, or use '
                "prune_oneshot with OneshotConfig."
            )
        return values

    def resolve_criterion(self, options: SimpleNamespace) -> str | None:
        known = isinstance(options.algorithm, str) and options.algorithm in ALGORITHMS
        algorithm: type[Algorithm] = ALGORITHMS[options.algorithm] if known else Algorithm
        if not algorithm.uses_criterion:
            return None
        return options.criterion or algorithm.default_criterion or "snip_momentum"

    def more_errors(self, options: SimpleNamespace, criterion: str | None) -> list[str]:
        algorithm: Algorithm = ALGORITHMS.create(options.algorithm, options.algorithm_kwargs)
        errors = algorithm.option_errors(options, get_pattern(options.pattern)) + penalty_errors(options)
        errors += self._scheduler_errors(options) if algorithm.follows_scheduler else []
        if options.rewind is not None and options.rewind_weights and not algorithm.can_rewind:
            errors.append(
                f'`rewind` restores weights of an earlier step, which `algorithm` "{options.algorithm}" does not '
                'support: use `rewind_weights=False`, or `algorithm="gradual"`.'
            )
        if not algorithm.uses_criterion and options.criterion is not None:
            errors.append(
                f'`criterion` is "{options.criterion}", but `algorithm` "{options.algorithm}" ranks weights by what '
                "it learns: leave `criterion` out."
            )
        return errors

    def resolve_scheduler(self, options: SimpleNamespace) -> Scheduler:
        return get_scheduler(options)

    def _scheduler_errors(self, options: SimpleNamespace) -> list[str]:
        """Returns an error for each option that the scheduler does not read."""
        unused = [
            name
            for name in self.resolve_scheduler(options).unused_options
            if getattr(options, name) != self.defaults[name]
        ]
        reason = "the target is reached in the first prune step"
        remedy = 'leave it out, or use `scheduler="iterative"` with `prune_end` after `prune_start`.'
        return [f"`{name}` has no effect, because {reason}: {remedy}" for name in unused]

    @property
    def unused_options(self) -> list[str]:
        """The options that were given although nothing is pruned, so that they have no effect."""
        groups = [values for values in self._group_values().values() if isinstance(values, dict)]
        targets = [target_of(SimpleNamespace(**values)) for values in groups]
        if any(target is not None for target in targets):
            return []  # 0 is said to prune nothing
        used = {"keep_zeros", *(field.name for field in dataclasses.fields(DistillationOptions))}
        used |= {"pattern", "targets", "exclude", "on_indivisible", "groups"} if self.keep_zeros else set()
        return [name for name in self.options() if name not in used and getattr(self, name) != self.defaults.get(name)]

    def unused_error(self) -> str | None:
        """Returns the error of options that have no effect because nothing is pruned, or None."""
        if not (names := self.unused_options):
            return None
        verb = "has" if len(names) == 1 else "have"
        reason = "`keep_zeros` alone prunes nothing more" if self.keep_zeros else "nothing is pruned"
        return (
            f"{format_options(names)} {verb} no effect, because {reason}: give `target_sparsity`, as in "
            f"`target_sparsity=0.8`, or leave {format_options(names)} out."
        )

    def schedule(self, max_steps: int) -> PruningSchedule:
        """Returns the prune steps of a training run of `max_steps` optimizer steps.

        Raises:
            ValueError: the target would be reached after the last step, pruning would end before it starts, or no
                step is left to rewind to or to train after that.
        """
        options = {name: getattr(self, name) for name in ("prune_start", "prune_end", "prune_every")}
        start, end, every = (self.defaults[name] if value is None else float(value) for name, value in options.items())
        return PruningSchedule.from_fractions(start, end, every, max_steps, self.rewind)
