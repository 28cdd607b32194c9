"""Curves f(t, A): the sparsity after the fraction t = c/n of the prune steps, for prune step c of n and target A.

Every curve is non-decreasing in t, with f(0, A) = 0 and f(1, A) = A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Protocol, TypeVar

from ..registry import Registry, format_value


CURVES = Registry("sparsity_decay_type")
"""Curves by name."""


class Curve(Protocol):
    """A function of the fraction of prune steps done and the target sparsity, both in [0, 1], that returns a sparsity
    from 0 to the target."""

    def __call__(self, t: float, target: float, /) -> float: ...


C = TypeVar("C", bound=Curve)


def register_curve(name: str) -> Callable[[C], C]:
    """Function decorator: registers a `Curve` as `sparsity_decay_type=name`, in arguments and on the command line.

    Raises:
        TypeError: the function cannot be called as `curve(t, target)`, or does not return a number.
        ValueError: another curve has this name.

    Example:
        >>> @register_curve("two_steps")
        ... def two_steps(t, target):
        ...     return target if t == 1 else target / 2
        >>> from hf_sparse.schedulers import IterativeScheduler
        >>> IterativeScheduler({"sparsity_decay_type": "two_steps"}).update_sparsity_ratio(0.8, 1, 4, {})
        0.4
    """

    def register(curve: C) -> C:
        try:
            values = [curve(t, 0.5) for t in (0.0, 0.5, 1.0)]
        except Exception as error:
            raise TypeError(
                f'curve "{name}" is called as curve(t, target), but {curve!r} cannot be ({error}): define it as '
                "def curve(t: float, target: float) -> float."
            ) from error
        if wrong := [value for value in values if not (isinstance(value, Real) and math.isfinite(value))]:
            raise TypeError(f'curve "{name}" returns {format_value(wrong[0])}: it must return a sparsity, a number.')
        return CURVES.register(name)(curve)

    return register


@register_curve("linear")
def linear(t: float, target: float) -> float:
    """A·t: every prune step prunes the same number of weights.

    Example:
        >>> [round(linear(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.2, 0.4, 0.6, 0.8]

    Reference: Intel Neural Compressor, pytorch_pruner.
    """
    return target * t


@register_curve("exp")
def exp(t: float, target: float) -> float:
    """1 - (1-A)^t: every prune step prunes the same fraction of the remaining weights.

    Example:
        >>> [round(exp(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.3313, 0.5528, 0.7009, 0.8]

    Reference: Intel Neural Compressor, pytorch_pruner.
    """
    return 1.0 - (1.0 - target) ** t


@register_curve("cos")
def cos(t: float, target: float) -> float:
    """A·(1 - cos(πt/2)): slow at first, fastest at the end.

    Example:
        >>> [round(cos(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.0609, 0.2343, 0.4939, 0.8]

    Reference: Intel Neural Compressor, pytorch_pruner.
    """
    return target * (1.0 - math.cos(t * math.pi / 2.0))


@register_curve("cube")
def cube(t: float, target: float) -> float:
    """A·t³: prunes most weights in the last prune steps.

    Example:
        >>> [round(cube(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.0125, 0.1, 0.3375, 0.8]

    Reference: Intel Neural Compressor, pytorch_pruner.
    """
    return target * t**3


@register_curve("cubic")
def cubic(t: float, target: float) -> float:
    """A·(1 - (1-t)³): fast while many weights are redundant, slow near the target. The default.

    Example:
        >>> [round(cubic(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8]

    Reference: Zhu and Gupta, "To prune, or not to prune", 2017, eq. 1.
    """
    return target * (1.0 - (1.0 - t) ** 3)
