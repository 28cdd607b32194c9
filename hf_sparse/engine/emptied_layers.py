"""Warns of layers of which pruning leaves almost nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ..distributed import get_communicator
from ..reporting.report import EMPTIED, LayerReport, layer_reports


logger = logging.getLogger(__name__)

_MAX_NAMES = 12
"""Names in one warning. The report has all of them."""


class EmptiedLayers:
    """The layers that have lost (almost) all their weights, each of which is named in one warning.

    A group whose target leaves less than that of every layer, or whose units are whole layers, is not warned of.

    Args:
        groups: the `ParameterGroup`s of the model.
    """

    def __init__(self, groups: Iterable[Any]):
        self._groups = [group for group in groups if group.target < EMPTIED and group.pattern.has_layers]
        self._known: set[str] = set()

    def add(self, zeros: Mapping[str, int]) -> list[LayerReport]:
        """Returns the layers that have been emptied since the last call.

        Args:
            zeros: the number of pruned weights of each layer by name; layers that are not named are left out.
        """
        groups = self._groups
        new = [layer for layer in layer_reports(groups, zeros) if layer.emptied and layer.name not in self._known]
        self._known.update(layer.name for layer in new)
        return new

    def warn(self, zeros: Mapping[str, int], when: str) -> None:
        """Logs one warning, on the main rank, that names the layers that have been emptied since the last call.

        Args:
            zeros: the number of pruned weights of each layer by name; layers that are not named are left out.
            when: begins the warning, as in "after prune step 3 of 4".
        """
        new = self.add(zeros)
        if not new or get_communicator().rank:
            return
        counts = [(layer.name, layer.weights - layer.zeros, layer.weights) for layer in new[:_MAX_NAMES]]
        shown = [f'"{name}" ({left:,} of {weights:,})' for name, left, weights in counts]
        shown += [f"and {len(new) - _MAX_NAMES} more"] if len(new) > _MAX_NAMES else []
        logger.warning(
            "%s, less than %s of the weights remain in %d %s: %s. To keep more of them, prune with %s.",
            when,
            f"{1 - EMPTIED:.1%}",
            len(new),
            "layer" if len(new) == 1 else "layers",
            ", ".join(shown),
            self._remedy(new),
        )

    def _remedy(self, new: Iterable[LayerReport]) -> str:
        names = {layer.group for layer in new}
        groups = [group for group in self._groups if group.name in names]
        # Half of what the target leaves of an average layer.
        bound = 1 - (1 - max(group.target for group in groups)) / 2
        remedies = [f"`max_sparsity_per_layer={bound:.6g}`"]
        if all(group.scope == "global" for group in groups):
            remedies.append('`scope="layer"`')
        first = next(iter(new))
        remedies.append(f'`exclude=["{first.name.removesuffix(".weight")}"]` for a layer that the task does not need')
        return f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
