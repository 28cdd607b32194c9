"""Scores of one layer's units under a criterion and a pattern, and the masks that a selection of units writes.

Shapes: R rows, P positions and C columns of a matrix; U units, whose first dimension is the rows of units.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch

from ..criteria import Criterion, TensorEntries
from ..distributed import SINGLE_PROCESS, Communicator, Shard, ShardRegion, Transfer, redistribute
from ..kernels import GROUP_SIZES, StoredScores
from ..model.layers import PrunableLayer
from ..numerics import chunk_size, count_true, prefers_numpy
from ..patterns import Pattern
from ..requires import Requires
from .row_blocks import first_offset, keeps_units_whole, partition_rows
from .row_masks import keep_mask_by_row
from .scores import sample_layout, sample_runs
from .threshold import Threshold


@dataclass(frozen=True)
class _RowSlice:
    """Rows of one matrix of the layer, and the positions of their weights in the layer.

    Args:
        weight, mask_bits, statistic: views (R, P, C).
        offset: position of the first weight.
        row_stride: distance of the positions of a row and the next.
        positions: (R, P, C) positions of all weights, for samples, which have no regular stride.
    """

    weight: torch.Tensor
    mask_bits: torch.Tensor
    statistic: torch.Tensor | None
    offset: int
    row_stride: int
    positions: torch.Tensor | None = None

    def select(
        self, function: Callable[[torch.Tensor], torch.Tensor], offset: int, positions: torch.Tensor | None = None
    ) -> _RowSlice:
        """Returns the slice of what `function` selects of each tensor."""
        statistic = None if self.statistic is None else function(self.statistic)
        return _RowSlice(
            function(self.weight), function(self.mask_bits), statistic, offset, self.row_stride, positions
        )

    def weight_positions(self) -> torch.Tensor:
        """Returns the index of each entry in the flattened whole weight, which breaks ties: (R, P, C), int64."""
        if self.positions is not None:
            return self.positions
        rows, *inner = self.weight.shape
        device = self.weight.device
        within_row = torch.arange(torch.Size(inner).numel(), device=device).view(1, *inner)
        return self.offset + torch.arange(rows, device=device)[:, None, None] * self.row_stride + within_row

    @property
    def is_contiguous(self) -> bool:
        """Whether the positions of all weights are consecutive."""
        return not len(self.weight) or self.row_stride == self.weight[0].numel()


class LayerScores:
    """Scores the units of one layer, for a threshold to be found, and writes the mask of the units that it selects.

    The score of a unit is pooled from the scores of its weights by the pattern. Units that are already pruned score
    -inf, so that they are selected first; units that the pattern protects score +inf. Scores are computed in chunks
    and never stored.

    Each rank reads and writes its part of a sharded weight, if shards hold whole units (and, with `by_row`, whole
    rows). Otherwise rows are redistributed evenly over the ranks for as long as they are read.

    Args:
        layer: the layer.
        criterion: scores the weights.
        pattern: pools the scores of weights into the scores of units.
        shard: the weight, as far as this rank holds it.
        mask_bits: int8 mask of the shard's shape, -1 where a weight is kept and 0 where it is pruned.
        statistic: what the criterion requires besides the weight, of the shard's shape, or None.
        by_row: whether units compete with those of their row only.
        communicator: of the ranks that hold the shards of the weight.
        prune_only: whether masks may only lose weights. If not, pruned weights are scored like kept ones and may
            return.
        grow_only: whether masks may only gain weights: kept ones score +inf. Not together with `prune_only`.
    """

    def __init__(
        self,
        layer: PrunableLayer,
        criterion: Criterion,
        pattern: Pattern,
        shard: Shard,
        mask_bits: torch.Tensor,
        statistic: torch.Tensor | None,
        by_row: bool,
        communicator: Communicator = SINGLE_PROCESS,
        prune_only: bool = True,
        grow_only: bool = False,
    ):
        self.layer, self.criterion, self.pattern, self.shard = layer, criterion, pattern, shard
        self.mask_bits, self.statistic = mask_bits, statistic
        self._prune_only, self._grow_only, self._communicator = prune_only, grow_only, communicator
        self.device = mask_bits.device
        # Single weights may compete in any layout of the parameter, without a view of its matrices.
        self._is_flat, self._by_row = pattern.flat and not by_row, by_row
        self._position_salt = zlib.crc32(layer.name.encode()) << 31  # makes positions unique over layers
        rows, _, columns = layer.matrix_shape
        self._unit_rows = pattern.unit_rows(rows)
        unit_shape = pattern.unit_shape(layer.matrix_shape)
        self.numel = layer.num_matrices * pattern.num_units(layer.matrix_shape)
        self.num_rows = layer.num_matrices * unit_shape[0]
        """Number of rows of units of the layer."""
        self.unit_size = layer.numel // self.numel
        """Number of weights of a unit."""
        self._row_blocks: Sequence[Sequence[ShardRegion]] | None = None
        width = columns if by_row else pattern.unit_columns(columns)
        if not self._is_flat and not keeps_units_whole(layer, shard, self._unit_rows, width):
            self._row_blocks = partition_rows(layer, self._unit_rows, communicator.world_size)
            regions: Sequence[ShardRegion] = self._row_blocks[communicator.rank]
        else:
            regions = shard.local_regions if shard.is_primary else ()
        self.reader_rank = communicator.rank if self._row_blocks else shard.primary_rank
        """The rank that reads the units which this rank writes."""
        self.local_numel = sum(region.numel for region in regions) // self.unit_size
        self._owned_slices: list[_RowSlice] = []
        if not self._row_blocks:
            self._owned_slices = self._slices(shard.local_regions, *map(shard.local_views, self._tensors()))

    @property
    def stored(self) -> StoredScores | None:
        """Where kernels find the scores of a whole layer, and write its mask; None where scores must be computed."""
        entries = self.criterion.score
        is_whole = self._communicator.world_size == 1 and len(self.shard.local_regions) == 1
        if not (isinstance(entries, TensorEntries) and self._prune_only and is_whole):
            return None
        n_of_m = self.pattern.n_of_m
        if not self._is_flat:
            # Adjacent inputs must be adjacent entries.
            has_groups = n_of_m[0] > 0 and n_of_m[1] in GROUP_SIZES and not self._by_row
            views = [part.weight for part in self._owned_slices]
            if not (has_groups and all(view.shape[1] == 1 and view.is_contiguous() for view in views)):
                return None
        tensor = entries.entries(self.shard.tensor, self.statistic)
        together = (tensor, self.mask_bits)
        if tensor.device != self.mask_bits.device or not all(each.is_contiguous() for each in together):
            return None
        return StoredScores(tensor, entries.magnitude, self.mask_bits, n_of_m)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yields the scores of all local units in the order of their position, as 1-D float32 tensors."""
        with torch.no_grad(), self._local_slices() as slices:
            for part in self._chunk_rows(slices):
                yield self.unit_scores(part).reshape(-1)

    def sample(self, count: int) -> torch.Tensor:
        """Returns about `count` of the local scores (1-D float32) from evenly spaced positions."""
        sampled = []
        with torch.no_grad(), self._local_slices() as slices:
            total = sum(part.weight.numel() for part in slices)
            for part in slices if self.local_numel else ():
                if self._is_flat and part.row_stride == 1:
                    part = _sample_weights(part, max(1, round(count * part.weight.numel() / total)))
                else:
                    part = self._sample_rows(part, min(1.0, count / self.local_numel))
                sampled.append(self.unit_scores(part).reshape(-1))
        return torch.cat(sampled) if sampled else torch.empty(0, device=self.device)

    def count_ties(self, value: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the number of local units equal to `value`, for each run of consecutive positions that has any.

        Returns:
            (N) int64 positions of the first weight of each run; (N) int64 counts.
        """
        counts: dict[int, int] = {}
        with torch.no_grad(), self._local_slices() as slices:
            for whole in slices:
                for part in self._chunk_rows([whole]):
                    scores = self.unit_scores(part)
                    equal = (scores == value).reshape(len(scores), -1).sum(1)
                    if whole.is_contiguous:
                        counts[whole.offset] = counts.get(whole.offset, 0) + int(equal.sum())
                    else:
                        step = part.row_stride * len(part.weight) // len(scores)
                        counts |= {part.offset + row * step: count for row, count in enumerate(equal.tolist())}
        positions = [position for position, count in counts.items() if count]
        return np.array(positions, dtype=np.int64), np.array([counts[position] for position in positions], np.int64)

    def apply_threshold(self, threshold: Threshold) -> None:
        """Prunes the local units that a threshold prunes and keeps all others.

        Args:
            threshold: of this rank, see `split_ties`.
        """
        ties_left = threshold.num_ties
        with torch.no_grad(), self._local_slices(writing=True) as slices:
            for part in self._chunk_rows(slices):
                scores = self.unit_scores(part)
                kept, ties_left = threshold.keep_mask(scores.reshape(-1), ties_left)
                self._write_mask(part.mask_bits, kept.view(scores.shape))

    def prune_rows(self, counts: torch.Tensor) -> None:
        """Prunes the counts[r] lowest units of each row r of units, and keeps all others.

        Args:
            counts: (num_rows) int64.
        """
        with torch.no_grad(), self._local_slices(writing=True) as slices:
            for part in self._chunk_rows(slices):
                scores = self.unit_scores(part)
                first = self._first_row(part)
                kept = keep_mask_by_row(scores.flatten(1), counts[first : first + len(scores)])
                self._write_mask(part.mask_bits, kept.view(scores.shape))

    def num_prunable_by_row(self) -> np.ndarray:
        """Returns for each row of units (num_rows) how many may be pruned in all: those that the pattern does not
        protect and those already pruned. 0 for rows that other ranks read."""
        counts = np.zeros(self.num_rows, dtype=np.int64)
        with torch.no_grad(), self._local_slices() as slices:
            for part in self._chunk_rows(slices):
                self._add_by_row(counts, part, self.unit_scores(part) < torch.inf)
        return counts

    def num_pruned_by_row(self) -> np.ndarray:
        """Returns for each row of units (num_rows) how many are pruned. 0 for rows that other ranks read."""
        counts = np.zeros(self.num_rows, dtype=np.int64)
        with torch.no_grad(), self._local_slices(scoring=False) as slices:
            for part in self._chunk_rows(slices):
                self._add_by_row(counts, part, self._pruned_units(part.mask_bits))
        return counts

    def num_locked_by_row(self) -> np.ndarray:
        """Returns for each row of units (num_rows) how many are pruned and cannot return. 0 for rows that other ranks
        read."""
        return self.num_pruned_by_row() if self._prune_only else np.zeros(self.num_rows, dtype=np.int64)

    def num_pruned(self) -> int | torch.Tensor:
        """Returns the number of local units that are pruned, for `gather_counts`."""
        with torch.no_grad(), self._local_slices(scoring=False) as slices:
            return sum(count_true(self._pruned_units(part.mask_bits)) for part in self._chunk_rows(slices))

    def has_nan(self) -> bool:
        """Returns whether a local score is NaN."""
        return any(bool(torch.isnan(chunk).any()) for chunk in self.chunks())

    def unit_scores(self, part: _RowSlice) -> torch.Tensor:
        """Returns the scores (U) of the units of a slice, float32, in memory of their own."""
        statistic = part.statistic
        if self.criterion.requires & Requires.POSITION:
            statistic = part.weight_positions() + self._position_salt
        scores = self.criterion.score(part.weight, statistic)
        if scores.shape != part.weight.shape:
            raise ValueError(
                f'criterion "{type(self.criterion).__name__}" must return one score per weight, but returns '
                f"{tuple(scores.shape)} for {tuple(part.weight.shape)}."
            )
        inputs = [tensor.untyped_storage().data_ptr() for tensor in (part.weight, statistic) if tensor is not None]
        # The scores are written to below: not to an input, nor to an expanded tensor whose entries share memory.
        shared = scores.untyped_storage().data_ptr() in inputs or 0 in scores.stride()
        scores = scores.detach().to(torch.float32, copy=shared)
        if self._prune_only and self.unit_size == 1:
            if prefers_numpy(self.device):
                # Sets pruned weights to -inf; on CPUs several times faster than masked_fill_.
                minus_infinity = (~part.mask_bits).to(torch.int32).bitwise_and_(-0x800000)
                scores.view(torch.int32).bitwise_and_(part.mask_bits).bitwise_or_(minus_infinity)
            else:
                scores.masked_fill_(part.mask_bits == 0, -torch.inf)
        elif self._grow_only:
            scores.masked_fill_(part.mask_bits != 0, torch.inf)
        scores = self.pattern.pool(scores)
        if self._prune_only and not self.pattern.flat:
            # Also pruned units that the pattern would protect, so that every pruned unit counts as selected.
            scores.masked_fill_(self._pruned_units(part.mask_bits), -torch.inf)
        return scores

    def _pruned_units(self, mask_bits_RPC: torch.Tensor) -> torch.Tensor:
        """Returns which units (U) of a slice have no weight left."""
        if self.unit_size == 1:
            rows, positions, columns = mask_bits_RPC.shape
            return (mask_bits_RPC == 0).reshape(self.pattern.unit_shape((rows, positions, columns)))
        return self.pattern.pruned_units(mask_bits_RPC)

    def _write_mask(self, mask_bits_RPC: torch.Tensor, kept_U: torch.Tensor) -> None:
        rows, positions, columns = mask_bits_RPC.shape
        mask = self.pattern.expand(kept_U, (rows, positions, columns))
        if self._prune_only:
            mask_bits_RPC.bitwise_and_(mask.to(torch.int8).neg_())
        else:
            mask_bits_RPC.copy_(mask).neg_()

    def _first_row(self, part: _RowSlice) -> int:
        """Returns the index of a slice's first row of units among those of the layer."""
        return part.offset // (part.row_stride * self._unit_rows)

    def _add_by_row(self, counts: np.ndarray, part: _RowSlice, selected_U: torch.Tensor) -> None:
        """Adds the number of selected units of each row of a slice to `counts` (num_rows)."""
        first = self._first_row(part)
        counts[first : first + len(selected_U)] += selected_U.flatten(1).sum(1).cpu().numpy()

    @contextmanager
    def _local_slices(self, writing: bool = False, scoring: bool = True) -> Iterator[list[_RowSlice]]:
        """Provides the slices that this rank reads or, for `writing`, holds. No two ranks read the same weight.

        Row blocks are redistributed on entry and, for `writing`, their masks on exit. Without `scoring`, weights and
        statistics are not redistributed: the mask takes their place.
        """
        shard, blocks = self.shard, self._row_blocks
        if blocks is None:
            yield self._owned_slices if writing or shard.is_primary else []
            return
        transfers = [
            Transfer(
                shard.local_views(tensor) if shard.is_primary else [],
                shard.primary_regions,
                blocks,
                tensor,
                packed=tensor is self.mask_bits,
            )
            for tensor in self._tensors()
            if scoring or tensor is self.mask_bits
        ]
        local = list(redistribute(transfers, self._communicator))
        try:
            yield self._slices(blocks[self._communicator.rank], *local)
        finally:
            if writing:
                mask_bits = local[1]
                transfer = Transfer(mask_bits, blocks, shard.regions_by_rank, self.mask_bits, packed=True)
                (written,) = redistribute([transfer], self._communicator)
                for target, source in zip(shard.local_views(self.mask_bits), written, strict=True):
                    target.copy_(source)

    def _tensors(self) -> list[torch.Tensor]:
        """Returns this rank's weight, mask and, if there is one, statistic."""
        tensors = [self.shard.tensor, self.mask_bits]
        return tensors if self.statistic is None else [*tensors, self.statistic]

    def _slices(
        self,
        regions: Sequence[ShardRegion],
        weights: Sequence[torch.Tensor],
        mask_bits: Sequence[torch.Tensor] | None = None,
        statistics: Sequence[torch.Tensor] | None = None,
    ) -> list[_RowSlice]:
        """Returns the tensors of regions of the weight as slices, in the order of their positions."""
        slices = []
        rows, positions, columns = self.layer.matrix_shape
        for index, region in enumerate(regions):
            tensors = [weights[index], weights[index] if mask_bits is None else mask_bits[index]]
            tensors += [] if statistics is None else [statistics[index]]
            if self._is_flat:
                runs = region.contiguous_runs(self.layer.shape)
                if runs is None:
                    raise NotImplementedError(f'{region} of "{self.layer.name}" has no constant stride.')
                count, length, stride = runs
                shape = (-1, 1, 1) if count == 1 else (count, 1, length)
                matrices = [[tensor.reshape(shape)] for tensor in tensors]
                offset, row_stride = region.flat_offset(self.layer.shape), 1 if count == 1 else stride
            else:
                matrices = [self.layer.matrices(tensor) for tensor in tensors]
                offset, row_stride = first_offset(self.layer, region), positions * columns
            for weight, bits, *statistic in zip(*matrices, strict=True):
                slices.append(_RowSlice(weight, bits, statistic[0] if statistic else None, offset, row_stride))
                offset += rows * positions * columns
        return slices

    def _chunk_rows(self, slices: list[_RowSlice]) -> Iterator[_RowSlice]:
        """Splits slices into chunks of rows, in whole units, that fit into a core's cache."""
        for part in slices:
            rows = len(part.weight)
            if not part.weight.numel():
                continue
            unit_rows = self.pattern.unit_rows(rows)
            step = chunk_size(part.weight.device) // part.weight[0].numel() // unit_rows * unit_rows
            step = max(unit_rows, step)
            for first in range(0, rows, step):
                chunk = slice(first, min(rows, first + step))
                yield part.select(itemgetter(chunk), part.offset + first * part.row_stride)

    def _sample_rows(self, part: _RowSlice, fraction: float) -> _RowSlice:
        """Returns an evenly spaced fraction of the rows of units of a slice."""
        unit_rows = self.pattern.unit_rows(len(part.weight))
        num_rows = len(part.weight) // unit_rows
        chosen = torch.linspace(0, num_rows - 1, max(1, round(fraction * num_rows)), dtype=torch.float64)
        index = chosen.round().long()[:, None] * unit_rows + torch.arange(unit_rows)
        index = index.reshape(-1).to(part.weight.device)
        within_row = torch.arange(part.weight[0].numel(), device=index.device).view(1, *part.weight.shape[1:])
        positions = part.offset + index[:, None, None] * part.row_stride + within_row
        return part.select(itemgetter(index), part.offset, positions)


def _sample_weights(part: _RowSlice, count: int) -> _RowSlice:
    """Returns about `count` of the single weights of a slice."""

    def sample(tensor: torch.Tensor) -> torch.Tensor:
        return sample_runs(tensor.reshape(-1), count).reshape(-1, 1, 1)

    num_runs, stride, run_length = sample_layout(part.weight.numel(), count)
    device = part.weight.device
    positions = torch.arange(num_runs, device=device)[:, None] * stride + torch.arange(run_length, device=device)
    return part.select(sample, part.offset, (part.offset + positions).view(-1, 1, 1))
