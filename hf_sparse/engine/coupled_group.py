"""CoupledParameterGroup: coupled units that are pruned by the same options, and their prune step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from ..allocations import LayerSize
from ..config import ResolvedGroup
from ..distributed import SINGLE_PROCESS, Communicator, Shard
from ..patterns.coupled import CoupledPattern
from ..selection.coupled_units import prune_units, pruned_units, score_units, unit_size
from ..selection.scores import TensorScores
from ..selection.threshold import find_thresholds
from .masks import MaskStore
from .parameter_group import ParameterGroup


class CoupledParameterGroup(ParameterGroup):
    """The coupled units of one group, the weights that they divide, and the statistics of those.

    Every rank has the scores of all units, see `score_units`, so that all select the same.

    Args:
        options: the resolved options of the group, with its units.
        communicator: the ranks that hold the weights.
    """

    def __init__(self, options: ResolvedGroup, communicator: Communicator = SINGLE_PROCESS):
        super().__init__(options, communicator)
        self.units = options.units

    @property
    def unit_counts(self) -> list[int]:
        return [group.num_units for group in self.units]

    def keep_zeros(self, shards: Mapping[str, Shard], masks: MaskStore) -> None:
        """Keeps the zeros of weights, and those of biases whose unit is zero: others may be zero before training."""
        super().keep_zeros(shards, masks)
        bits, biases = self._bits(masks), {name: shards[name] for name in self.options.biases}
        pruned = pruned_units(self.units, self._weights(shards), bits, self.communicator)
        for group, pruned_U in zip(self.units, pruned, strict=True):
            prune_units(group, ~pruned_U, biases, bits)
        for name, shard in biases.items():
            masks.replace(name, masks[name] | (shard.tensor != 0))

    def prune(
        self,
        prune_step: int,
        total_steps: int,
        shards: Mapping[str, Shard],
        masks: MaskStore,
        statistics: Mapping[str, torch.Tensor] | None = None,
        gradients: Mapping[str, torch.Tensor | None] | None = None,
    ) -> float:
        if not self.target:
            return 0.0  # Only the zeros that the weights had at the start are kept.
        ratio, known = self._start_prune_step(prune_step, total_steps, shards, masks, statistics)
        before = self._mask_bits_to_update(masks)
        bits = self._bits(masks)
        scores = score_units(
            self.units, self.required_criterion, self._weights(shards), bits, known, self.communicator
        )
        names = [f'"{group.name}"' for group, score_U in zip(self.units, scores, strict=True) if score_U.isnan().any()]
        if names:
            raise ValueError(
                f'group "{self.name}", criterion "{self.options.criterion_name}": scores are nan in {", ".join(names)}'
            )
        counts = self.num_pruned_by_group(scores, ratio)
        for group, keep_U in zip(self.units, keep_masks(scores, sum(counts), counts, counts), strict=True):
            prune_units(group, keep_U, shards, bits)
        self._update_weights(shards, masks, before)
        self._restart_statistics()
        return ratio

    def num_pruned_by_group(self, scores: Sequence[torch.Tensor], ratio: float) -> list[int]:
        """Returns how many units of each group of units to prune, with those that are pruned already.

        Args:
            scores: (U) of each group; those of pruned units are -inf.
            ratio: the sparsity.
        """
        pattern, sizes = cast(CoupledPattern, self.pattern), self.unit_counts
        pruned = [int((score_U == -torch.inf).sum()) for score_U in scores]
        wanted: Sequence[float]
        if self.scope == "global":
            floors, caps = self._bounds(pruned, ratio)
            if self.target < 1 and pattern.has_layers:
                caps = [max(min(cap, size - 1), count) for cap, size, count in zip(caps, sizes, pruned, strict=True)]
            total = min(max(pattern.count(ratio * sum(sizes), sum(sizes)), sum(floors)), sum(caps))
            wanted = [int((~keep_U).sum()) for keep_U in keep_masks(scores, total, floors, caps)]
        else:
            # Units pruned before do not change the shares of other groups, which would lose their common width.
            shares = self._shares(ratio, *self._bounds([0] * len(sizes), ratio))
            wanted = [share * size for share, size in zip(shares, sizes, strict=True)]
        counts = [pattern.count(number, size) for number, size in zip(wanted, sizes, strict=True)]
        return [max(both) for both in zip(counts, pruned, strict=True)]

    def _shares(self, ratio: float, floors: list[int], caps: list[int]) -> list[float]:
        """Returns the sparsity of each group of units."""
        shapes = {layer.name: layer.shape for layer in self.layers}
        sizes = [
            LayerSize(str(index), group.num_units, group.num_units, unit_size(group, shapes), 1, floor, cap)
            for index, (group, floor, cap) in enumerate(
                zip(self.units, *([n / g.num_units for n, g in zip(side, self.units)] for side in (floors, caps)))
            )
        ]
        shares = self.options.allocation.allocate(ratio, sizes)
        return [shares[size.name] for size in sizes]

    def _weights(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        return {layer.name: shards[layer.name] for layer in self.layers}

    def _bits(self, masks: MaskStore) -> dict[str, torch.Tensor]:
        return {name: masks.bits(name) for name in self.parameter_shapes}


def keep_masks(
    scores: Sequence[torch.Tensor], total: int, floors: Sequence[int], caps: Sequence[int]
) -> list[torch.Tensor]:
    """Returns the masks (U) that prune the `total` lowest units within the bounds of each group, ties by position."""
    thresholds = find_thresholds([TensorScores(score_U) for score_U in scores], total, floors, caps)
    return [
        threshold.keep_mask(score_U, threshold.num_ties)[0]
        for score_U, threshold in zip(scores, thresholds, strict=True)
    ]


def new_parameter_group(options: ResolvedGroup, communicator: Communicator = SINGLE_PROCESS) -> ParameterGroup:
    """Returns the parameter group of resolved options: of coupled units where there are any, else of layers."""
    return (CoupledParameterGroup if options.units else ParameterGroup)(options, communicator)
