"""Dynamic sparse training: masks that also gain weights while the model is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from ..criteria import CRITERIA, Criterion
from ..patterns import Pattern
from ..registry import format_name, format_value, nearest
from ..requires import Requires
from .base import Algorithm


class DynamicSparsity(Algorithm):
    """A kind of algorithm: masks lose weights and gain others at prune steps. A prune step does, in this order:

    1. all pruned weights return, where `opens_masks` says so;
    2. the lowest units by the criterion are pruned, up to `sparsity`;
    3. of the units that are kept, the lowest `exchanged_fraction` is pruned as well, and as many of all pruned units
       return: the highest by `growth`, among them those that were pruned just now.

    The sparsity after each prune step is exact. Weights that return start at +0.0, and the optimizer's state for them
    at 0. With N:M, step 3 prunes the lowest without regard to their groups, and each group that is left with fewer
    than N weights gains as many as it lacks, by the scores of its own weights.

    Masks follow from weights, gradients and positions alone, and are the same on any number of ranks.

    Example:
        >>> class LastStepSparse(DynamicSparsity):
        ...     def sparsity(self, scheduled, target, prune_step, total):
        ...         return target if prune_step == total else 0.0
        ...     def opens_masks(self, prune_step, total):
        ...         return True
        >>> [LastStepSparse().sparsity(0.3, 0.9, step, 2) for step in (1, 2)]
        [0.0, 0.9]
    """

    default_criterion = "magnitude"
    exchanges: ClassVar[bool] = False
    """Whether prune steps exchange units."""

    @property
    def initial_criterion(self) -> Criterion | None:
        """The criterion, of weights or positions, by which weights are pruned to the target before the first step;
        None if training starts dense."""
        return None

    def sparsity(self, scheduled: float, target: float, prune_step: int, total: int) -> float:
        """Returns the sparsity after a prune step.

        Args:
            scheduled: by the scheduler.
            target: of the parameter group.
            prune_step, total: this prune step, from 1, of how many; 0 is before the first one.
        """
        return scheduled

    def opens_masks(self, prune_step: int, total: int) -> bool:
        """Whether all pruned weights return at a prune step, before any is pruned."""
        return False

    def exchanged_fraction(self, prune_step: int, total: int) -> float:
        """Returns the fraction of the kept units that a prune step exchanges for pruned ones, from 0 to 1."""
        return 0.0

    def growth(self, prune_step: int) -> Criterion | None:
        """Returns the criterion by which pruned units return, the highest first; None if units are not exchanged.

        It requires nothing, `POSITION`, or, where `reads_gradients` is True, `GRADIENTS`: then its statistic is the
        gradient at this prune step.
        """
        return None

    def option_errors(self, options: SimpleNamespace, pattern: Pattern) -> list[str]:
        name, errors = options.algorithm, []
        if options.keep_zeros:
            errors.append(
                f'`algorithm` "{name}" restores pruned weights and `keep_zeros` forbids it: leave `keep_zeros` out, '
                "or use another algorithm."
            )
        if self.exchanges and not pattern.has_rows:
            errors.append(
                f'`algorithm` "{name}" exchanges single weights, N:M or blocks, not units of `pattern` '
                f'"{options.pattern}": choose one of these patterns, or another algorithm.'
            )
        criterion = CRITERIA.create(options.criterion, options.criterion_kwargs) if options.criterion else None
        if self.exchanges and getattr(criterion, "updates_weights", False):
            errors.append(
                f'`criterion` "{options.criterion}" updates the weights that remain, also those that `algorithm` '
                f'"{name}" lets return at zero: set `criterion_kwargs={{"update": False}}`, or use another criterion.'
            )
        ignored = {"scheduler": None, "sparsity_decay_type": "cubic", "initial_sparsity": 0.0}
        for option, default in ignored.items() if not self.follows_scheduler else ():
            value = getattr(options, option)
            if value not in (None, default):
                errors.append(
                    f'`{option}` is {format_value(value)}, but `algorithm` "{name}" sets the sparsity itself: leave '
                    f"`{option}` out."
                )
        return errors


_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2.0,
    "linear": lambda t: 1.0 - t,
    "constant": lambda t: 1.0,
}


@dataclass(frozen=True)
class Exchange(DynamicSparsity):
    """Dynamic sparsity whose prune step c of n exchanges the fraction

        fraction * (1 + cos(pi * c/n)) / 2        (decay "cosine"; "linear": 1 - c/n; "constant": 1)

    of the units that are kept.

    Args:
        fraction: from 0 to 1.
        decay: "cosine", "linear" or "constant".

    Example:
        >>> [round(Exchange(fraction=0.3).exchanged_fraction(c, 4), 3) for c in range(5)]
        [0.3, 0.256, 0.15, 0.044, 0.0]
    """

    fraction: float = 0.3
    decay: str = "cosine"

    exchanges = True

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"`fraction` is {self.fraction}: it must be a number from 0 to 1, as in 0.3")
        if self.decay not in _DECAYS:
            raise ValueError(
                f"`decay` is {format_name(self.decay)}: known are {', '.join(_DECAYS)}.{nearest(self.decay, _DECAYS)}"
            )

    def exchanged_fraction(self, prune_step: int, total: int) -> float:
        return self.fraction * _DECAYS[self.decay](prune_step / total)


@dataclass(frozen=True)
class SparseFromStart(Exchange):
    """Dynamic sparsity that has the target sparsity from before the first step on.

    Args:
        fraction, decay: see `Exchange`.
        initial_mask: a criterion of weights or positions, by which weights are pruned before training: "random", as
            published for models that are trained from scratch, or "magnitude", for pretrained ones.
    """

    initial_mask: str = "magnitude"

    default_scope = "layer"
    follows_scheduler = False

    def __post_init__(self) -> None:
        super().__post_init__()
        usable = [name for name in CRITERIA.names() if not CRITERIA[name].requires & ~Requires.POSITION]
        if self.initial_mask not in usable:
            raise ValueError(
                f"`initial_mask` is {format_name(self.initial_mask)}: it must be a criterion that can score weights "
                f"before training, one of {', '.join(usable)}"
            )

    @property
    def initial_criterion(self) -> Criterion:
        return CRITERIA.create(self.initial_mask)

    def sparsity(self, scheduled: float, target: float, prune_step: int, total: int) -> float:
        return target
