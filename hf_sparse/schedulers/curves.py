"""Curves: the sparsity after a share `t` of the prune steps, on the way from 0 to `target`.

Legend: t in [0, 1] = c/n, prune step c of n; A = target. Every curve f has f(0) = 0, f(1) = A and never falls.
A new curve is one function and one decorator.
"""

from __future__ import annotations

import math

from ..registry import Registry


CURVES = Registry("sparsity_decay_type")
register_curve = CURVES.register


@register_curve("linear")
def linear(t: float, target: float) -> float:
    """A·t: every prune step removes the same number of weights.

    Example:
        >>> [round(linear(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    return target * t


@register_curve("exp")
def exp(t: float, target: float) -> float:
    """1 - (1-A)^t: every prune step removes the same share of the weights that are left.

    Example:
        >>> [round(exp(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.3313, 0.5528, 0.7009, 0.8]
    """
    return 1.0 - (1.0 - target) ** t


@register_curve("cos")
def cos(t: float, target: float) -> float:
    """A·(1 - cos(πt/2)): slow at first, fastest at the end.

    Example:
        >>> [round(cos(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.0609, 0.2343, 0.4939, 0.8]
    """
    return target * (1.0 - math.cos(t * math.pi / 2.0))


@register_curve("cube")
def cube(t: float, target: float) -> float:
    """A·t³: almost nothing at first, almost everything at the end.

    Example:
        >>> [round(cube(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.0125, 0.1, 0.3375, 0.8]
    """
    return target * t**3


@register_curve("cubic")
def cubic(t: float, target: float) -> float:
    """A·(1 - (1-t)³): fast while much is redundant, gentle near the target. The default.

    Example:
        >>> [round(cubic(t / 4, 0.8), 4) for t in range(5)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8]

    Reference: Zhu and Gupta, "To prune, or not to prune", 2017, eq. 1.
    """
    return target * (1.0 - (1.0 - t) ** 3)
