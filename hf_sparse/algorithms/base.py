"""Base class of algorithms: how training finds the zeros."""

from __future__ import annotations

from abc import ABC
from types import SimpleNamespace
from typing import ClassVar

from ..methods import MethodRegistry
from ..patterns import Pattern


class Algorithm(ABC):
    """How training finds the zeros, one algorithm in a run.

    The kinds of algorithms are the direct subclasses. A member of a kind is registered with `register_algorithm`; when
    it is a frozen dataclass, its fields are its options (`algorithm_kwargs`).
    """

    uses_criterion: ClassVar[bool] = True
    """Whether prune steps rank weights by an importance criterion."""
    reads_gradients: ClassVar[bool] = False
    """Whether the algorithm reads or changes the gradients of the selected weights, which must not be frozen then."""
    default_criterion: ClassVar[str | None] = None
    """The criterion of the algorithm's paper, where the options name none; None for that of gradual pruning."""
    default_scope: ClassVar[str | None] = None
    """The ranking scope where the options name none; None for that of the criterion."""

    follows_scheduler: ClassVar[bool] = True
    """Whether the sparsity after a prune step is that of the scheduler."""
    can_rewind: ClassVar[bool] = True
    """Whether the weights of an earlier step can be restored: not where they follow from other values that are
    learned."""

    def option_errors(self, options: SimpleNamespace, pattern: Pattern) -> list[str]:
        """Returns the errors of a parameter group's options that the algorithm does not support. Without a
        criterion these are coupled units, and zeros that are kept.

        Args:
            options: of the group, valid by themselves.
            pattern: of the group.
        """
        errors: list[str] = []
        if self.uses_criterion:
            return errors
        name = options.algorithm
        if pattern.coupled_kind is not None:
            errors.append(
                f'`algorithm` "{name}" selects weights and blocks, not units of `pattern` "{pattern}": use '
                f'`pattern="unstructured"`, a block such as `pattern="4x1"`, or `algorithm="{DEFAULT_ALGORITHM}"`.'
            )
        if options.keep_zeros:
            errors.append(
                f'`keep_zeros` is set, but with `algorithm` "{name}" pruned weights may come back: leave `keep_zeros` '
                f'out, or use `algorithm="{DEFAULT_ALGORITHM}"`.'
            )
        return errors


ALGORITHMS = MethodRegistry("algorithm", Algorithm)
register_algorithm = ALGORITHMS.register
DEFAULT_ALGORITHM = "gradual"
