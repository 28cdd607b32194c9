"""Options of penalties, which only training has."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..penalties import Penalty
from .base import option
from .validation import target_of


@dataclass
class PenaltyOptions:
    """A term of the loss that draws weights towards zero before they are pruned."""

    penalty: Penalty | str | None = option(
        "Penalty on the selected weights, a term of the loss: group_lasso (of whole units of the pattern), l1 (of "
        "single weights), or a registered one. Default: none."
    )
    penalty_kwargs: dict[str, Any] | str | None = option(
        'Options of the penalty, as JSON: {"strength": 1e-4, "warmup": 0.1, "until_prune_end": true}.'
    )


def penalty_errors(options: SimpleNamespace) -> list[str]:
    """Returns why the penalty of a group cannot work: nothing is pruned that it would prepare."""
    if options.penalty is None or target_of(options):
        return []
    return [
        f'`penalty` is "{options.penalty}", but nothing is pruned: give `target_sparsity`, as in '
        "`target_sparsity=0.8`, or leave `penalty` out."
    ]
