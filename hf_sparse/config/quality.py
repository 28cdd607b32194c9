"""Quality presets of one-shot pruning: tested values of the options that were not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..patterns import Pattern
from ..solvers import SOLVERS


_WEIGHTS: dict[str, dict[str, Any]] = {
    "fast": {"criterion": "wanda"},
    "good": {"solver": "sparsegpt"},
    "best": {"solver": "admm", "allocation": "owl", "reconstruct": True},
}
_UNITS: dict[str, dict[str, Any]] = {
    "fast": {"criterion": "fluctuation", "solver": "lstsq"},
    "good": {"criterion": "obs", "solver": "lstsq"},
    "best": {"criterion": "obs", "solver": "lstsq", "reconstruct": True},
}
QUALITIES = tuple(_WEIGHTS)
"""From the fastest to the best."""
RUN_OPTIONS = ("reconstruct",)
"""Options of a preset that all groups share."""


def preset_options(
    quality: str, pattern: Pattern, given: Mapping[str, Any], criterion_scope: str | None = None
) -> dict[str, Any]:
    """Returns the options that a quality preset adds to those of a parameter group.

    Options that were given stay, and nothing is added that they rule out: no criterion beside a given solver unless
    that needs one, no allocation where layers cannot have sparsities of their own.

    Args:
        quality: "fast", "good" or "best".
        pattern: of the group.
        given: the options of the group; None are those that were not given.
        criterion_scope: the ranking scope of a given criterion, where no scope was given.

    Example:
        >>> from hf_sparse.patterns import get_pattern
        >>> preset_options("good", get_pattern("2:4"), {})
        {'solver': 'sparsegpt'}
        >>> preset_options("good", get_pattern("unstructured"), {"scope": "global"})
        {'criterion': 'wanda', 'solver': 'sparsegpt'}
        >>> preset_options("fast", get_pattern("unstructured"), {"solver": "sparsegpt"})
        {}
    """
    if not pattern.has_layers:
        return {}  # whole layers have one criterion, and nothing remains to update
    taken = {name for name, value in given.items() if value is not None}
    chosen = dict((_WEIGHTS if pattern.coupled_kind is None else _UNITS)[quality])
    if pattern.coupled_kind is None:
        solver, scope = str(given.get("solver") or chosen.get("solver")), given.get("scope")
        if "solver" in taken:
            chosen.pop("criterion", None)
        if solver in SOLVERS and SOLVERS[solver].selects:
            selectable = pattern.has_rows and scope in (None, *SOLVERS[solver].scopes)
            if not selectable or given.get("swaps"):
                chosen = {"criterion": Pattern.oneshot_criterion} | chosen
        if (scope or criterion_scope) == "global" or pattern.implied_sparsity is not None:
            chosen.pop("allocation", None)
    if given.get("layer_sparsity"):
        chosen.pop("allocation", None)
    if given.get("sequential") is False or given.get("forwards") == 1:
        chosen.pop("reconstruct", None)  # it works block by block, between two forwards
    return {name: value for name, value in chosen.items() if name not in taken}
