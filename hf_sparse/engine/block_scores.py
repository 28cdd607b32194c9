"""Scores and weight updates from the last gradients of blocks of a row, on whatever ranks hold the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..criteria import GradientHistoryCriterion
from ..distributed import Communicator, Shard, Transfer, redistribute
from ..model.layers import PrunableLayer
from ..patterns import Pattern
from ..selection.row_blocks import keeps_units_whole, partition_rows
from ..statistics import GradientHistory


class BlockScores:
    """Scores and updates one layer by a `GradientHistoryCriterion`, on all ranks at once.

    Each rank computes what it holds, where shards hold whole blocks. Otherwise rows are redistributed evenly over the
    ranks, and the result is sent back: blocks are the same on any number of ranks.

    Args:
        criterion: the criterion.
        pattern: gives the number of adjacent inputs of a row that one unit holds; 1 for coupled units.
        layer: the layer.
        shard: the weight, as far as this rank holds it.
        history: the last gradients of the shard.
        communicator: of the ranks that hold the shards of the weight.
    """

    def __init__(
        self,
        criterion: GradientHistoryCriterion,
        pattern: Pattern,
        layer: PrunableLayer,
        shard: Shard,
        history: GradientHistory,
        communicator: Communicator,
    ):
        self._criterion, self._layer, self._shard = criterion, layer, shard
        self._history, self._communicator = history, communicator
        rows, _, columns = layer.matrix_shape
        part = (pattern.unit_rows(rows), 1, columns)
        self._width = 1 if pattern.coupled_kind is not None else columns // pattern.num_units(part)
        self._block = criterion.block_columns(columns, self._width)

    def weight_scores(self, mask_bits: torch.Tensor) -> torch.Tensor:
        """Returns the scores of the shard's weights, float32 of its shape.

        Args:
            mask_bits: int8 of the shard's shape, 0 where a weight is pruned.
        """

        def scores(weight: torch.Tensor, bits: torch.Tensor, *gradients: torch.Tensor) -> torch.Tensor:
            return self._criterion.weight_scores(weight, bits != 0, gradients, self._block, self._width)

        return self._compute(scores, [mask_bits])

    @torch.no_grad()
    def update_weight(self, bits_before: torch.Tensor, mask_bits: torch.Tensor) -> None:
        """Updates the shard's weights that a prune step has left.

        Args:
            bits_before, mask_bits: int8 of the shard's shape, 0 where a weight was pruned before, and is now.
        """

        def change(
            weight: torch.Tensor, before: torch.Tensor, bits: torch.Tensor, *gradients: torch.Tensor
        ) -> torch.Tensor:
            return self._criterion.weight_change(weight, before != 0, bits != 0, gradients, self._block)

        weight = self._shard.tensor
        weight.copy_(weight + self._compute(change, [bits_before, mask_bits]))

    @torch.no_grad()
    def _compute(self, function: Callable[..., torch.Tensor], masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns `function` of the matrices of the weight, of masks and of each gradient, in the shard's layout."""
        shard, layer = self._shard, self._layer
        result = torch.empty(shard.tensor.shape, dtype=torch.float32, device=shard.tensor.device)
        if keeps_units_whole(layer, shard, 1, self._block):
            tensors = [shard.tensor, *masks, *self._history.gradients]
            self._fill(shard.local_views(result), function, [shard.local_views(tensor) for tensor in tensors])
            return result
        blocks = partition_rows(layer, 1, self._communicator.world_size)
        # The number of gradients may differ: a rank that holds nothing of the weight has observed none.
        tensors = [shard.tensor, *masks, *self._history.padded()]
        transfers = [
            Transfer(
                shard.local_views(tensor) if shard.is_primary else [],
                shard.primary_regions,
                blocks,
                tensor,
                packed=any(tensor is mask for mask in masks),
            )
            for tensor in tensors
        ]
        rows = list(redistribute(transfers, self._communicator))
        computed = [result.new_empty(region.shape) for region in blocks[self._communicator.rank]]
        self._fill(computed, function, rows)
        (local,) = redistribute([Transfer(computed, blocks, shard.regions_by_rank, result)], self._communicator)
        for view, part in zip(shard.local_views(result), local, strict=True):
            view.copy_(part)
        return result

    def _fill(
        self,
        results: Sequence[torch.Tensor],
        function: Callable[..., torch.Tensor],
        tensors: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        """Writes `function` of each matrix of each region into `results`, one tensor for each region."""
        for index, result in enumerate(results):
            matrices = [self._layer.matrices(by_region[index]) for by_region in tensors]
            for target, *parts in zip(self._layer.matrices(result), *matrices, strict=True):
                if target.numel():
                    target.copy_(function(*parts))
