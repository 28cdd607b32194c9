"""The scores of one layer's units, computed part by part whenever they are read; masks are written the same way."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch

from ..criteria import Criterion
from ..distributed import SINGLE_PROCESS, Communicator, Shard, Transfer, redistribute
from ..model.layers import PrunableLayer
from ..numerics import chunk_size
from ..patterns import Pattern
from ..requires import Requires
from .ranking import Threshold, keep, keep_mask_by_row
from .row_blocks import first_offset, keeps_units_whole, partition_rows
from .scores import places, spread


@dataclass(frozen=True)
class _Part:
    """Some rows of one matrix: tensors (R, P, C), and the places of their weights in the layer."""

    weight: torch.Tensor
    bits: torch.Tensor
    stat: torch.Tensor | None
    place: int
    """Of the first weight."""
    stride: int
    """From the first weight of a row to that of the next."""
    chosen: torch.Tensor | None = None
    """The places of all the weights, where they follow no stride."""

    def rows(self, first: int, last: int) -> _Part:
        weight, bits, stat = (
            tensor[first:last] if tensor is not None else None for tensor in (self.weight, self.bits, self.stat)
        )
        return _Part(weight, bits, stat, self.place + first * self.stride, self.stride)

    def places(self) -> torch.Tensor:
        if self.chosen is not None:
            return self.chosen
        rows, *inner = self.weight.shape
        device = self.weight.device
        within = torch.arange(torch.Size(inner).numel(), device=device).view(1, *inner)
        return self.place + torch.arange(rows, device=device)[:, None, None] * self.stride + within

    @property
    def unbroken(self) -> bool:
        """Whether no place lies between the rows."""
        return self.stride == self.weight[0].numel() if len(self.weight) else True


class LayerScores:
    """One layer under one criterion and pattern; what `ranking` reads.

    A unit that is pruned already scores -inf, so it falls before any other, and one that the pattern protects scores
    +inf. Nothing of the weight's size is ever stored. Where the weight is split, each process reads and decides a part
    of it.

    Args:
        layer: where the weight is and how it is laid out.
        shard, bits: the weight and its mask (int8, 0 where pruned), as far as this process holds them.
        stat: what the criterion needs of the layer, of the same shape; None if nothing.
        scattered: whether single weights compete whatever their place, so that the layout does not matter.
        communicator: that hold the weight between them.
        shrink: whether masks may only lose weights; if not, pruned weights are ranked like any other.
    """

    def __init__(
        self,
        layer: PrunableLayer,
        criterion: Criterion,
        pattern: Pattern,
        shard: Shard,
        bits: torch.Tensor,
        stat: torch.Tensor | None,
        scattered: bool,
        communicator: Communicator = SINGLE_PROCESS,
        shrink: bool = True,
    ):
        self.layer, self.criterion, self.pattern, self.shard = layer, criterion, pattern, shard
        self.bits, self._stat, self._shrink, self._communicator = bits, stat, shrink, communicator
        self.device = bits.device
        self._scattered = scattered and pattern.flat
        self._salt = zlib.crc32(layer.name.encode()) << 31
        rows = layer.matrix_shape[0]
        self._height = pattern.unit_rows(rows)
        self.matrices = layer.num_matrices
        per_matrix = pattern.unit_shape(layer.matrix_shape)
        self.numel = self.matrices * torch.Size(per_matrix).numel()
        self.rows = self.matrices * per_matrix[0]
        self.unit_size = layer.numel // self.numel
        self._row_blocks = None
        columns = layer.matrix_shape[2]
        width = pattern.unit_columns(columns) if scattered else columns  # or else a whole row competes
        if not self._scattered and not keeps_units_whole(layer, shard, self._height, width):
            self._row_blocks = partition_rows(layer, self._height, communicator.world_size)
        self.holder = communicator.rank if self._row_blocks else shard.primary_rank
        """The process that reads what this one writes."""
        own = (
            self._row_blocks[communicator.rank]
            if self._row_blocks
            else shard.local_regions
            if shard.is_primary
            else ()
        )
        self.held = sum(box.numel for box in own) // self.unit_size
        self._here = (
            None if self._row_blocks else self._arranged(shard.local_regions, *map(shard.local_views, self._tensors()))
        )

    # The weight as this process sees it

    def _tensors(self) -> list[torch.Tensor]:
        """Weight, bits and, if there is one, stat."""
        return [tensor for tensor in (self.shard.tensor, self.bits, self._stat) if tensor is not None]

    def _arranged(self, boxes, weights, bits, stats=None) -> list[_Part]:
        """The tensors of some boxes as parts, in the order of their places."""
        parts = []
        for index, box in enumerate(boxes):
            tensors = weights[index], bits[index], stats[index] if stats else None
            if self._scattered:
                count, length, stride = box.contiguous_runs(self.layer.shape)
                shape = (-1, 1, 1) if count == 1 else (count, 1, length)
                views = (tensor if tensor is None else tensor.reshape(shape) for tensor in tensors)
                parts.append(_Part(*views, box.flat_offset(self.layer.shape), 1 if count == 1 else stride))
                continue
            rows, positions, columns = self.layer.matrix_shape
            place = first_offset(self.layer, box)
            views = (repeat(None) if tensor is None else self.layer.matrices(tensor) for tensor in tensors)
            for view in zip(*views):
                parts.append(_Part(*view, place, positions * columns))
                place += rows * positions * columns
        return parts

    @contextmanager
    def _open(self, writing: bool = False, scoring: bool = True) -> Iterator[list[_Part]]:
        """The parts that this process is to look at: for reading, no weight twice in all processes; for `writing`,
        with all that it holds. What was dealt out comes for that long, and masks that were written go back. The
        weights come only for `scoring`; else masks stand in for them."""
        if self._here is not None:
            yield self._here if writing or self.shard.is_primary else []
            return
        shard, communicator = self.shard, self._communicator
        tensors = [tensor for tensor in self._tensors() if scoring or tensor is self.bits]
        own = [shard.local_views(tensor) if shard.is_primary else [] for tensor in tensors]
        loads = [
            Transfer(parts, shard.primary_regions, self._row_blocks, tensor, packed=tensor is self.bits)
            for parts, tensor in zip(own, tensors, strict=True)
        ]
        parts = list(redistribute(loads, communicator))
        bits = parts[1] if scoring else parts[0]
        try:
            yield self._arranged(self._row_blocks[communicator.rank], parts[0], bits, *parts[2:])
        finally:
            if writing:
                (written,) = redistribute(
                    [Transfer(bits, self._row_blocks, shard.regions_by_rank, self.bits, packed=True)], communicator
                )
                for target, source in zip(shard.local_views(self.bits), written, strict=True):
                    target.copy_(source)

    # What ranking reads

    def chunks(self) -> Iterator[torch.Tensor]:
        """Scores of the units held, in position order, 1-D float32."""
        with torch.no_grad(), self._open() as parts:
            for part in self._cached(parts):
                yield self._pooled(part).reshape(-1)

    def sample(self, count: int) -> torch.Tensor:
        """About `count` of the scores held, from places spread evenly over them."""
        with torch.no_grad(), self._open() as parts:
            sampled = [self._pooled(part).reshape(-1) for part in self._some(parts, count)] if self.held else []
        return torch.cat(sampled) if sampled else torch.empty(0, device=self.device)

    def tied(self, value: float) -> tuple[np.ndarray, np.ndarray]:
        """How many of the units held equal `value`, in each run of neighbouring places that this process holds and
        where some do: (places of the first weights, counts)."""
        found: dict[int, int] = {}
        with torch.no_grad(), self._open() as parts:
            for whole in parts:
                for part in self._cached([whole]):
                    scores = self._pooled(part)
                    equal = (scores == value).reshape(len(scores), -1).sum(1)
                    if whole.unbroken:
                        found[whole.place] = found.get(whole.place, 0) + int(equal.sum())
                    else:
                        step = part.stride * len(part.weight) // len(scores)
                        found |= {part.place + row * step: count for row, count in enumerate(equal.tolist())}
        starts = [place for place, count in found.items() if count]
        return np.array(starts, dtype=np.int64), np.array([found[place] for place in starts], dtype=np.int64)

    # What the pruner writes

    def write_threshold(self, cut: Threshold) -> None:
        """Prune the units held that a localized cut lets fall, and keep all others."""
        ties = cut.ties
        with torch.no_grad(), self._open(writing=True) as parts:
            for part in self._cached(parts):
                scores = self._pooled(part)
                kept, ties = keep(scores.reshape(-1), cut, ties)
                self._write(part.bits, kept.view(scores.shape))

    def write_rows(self, counts: torch.Tensor) -> None:
        """Prune the lowest counts[r] units of each row r of units of the layer."""
        with torch.no_grad(), self._open(writing=True) as parts:
            for part in self._cached(parts):
                scores = self._pooled(part)
                first = self._row_of(part)
                kept = keep_mask_by_row(scores.flatten(1), counts[first : first + len(scores)])
                self._write(part.bits, kept.view(scores.shape))

    def prunable_units_by_row(self) -> np.ndarray:
        """How many units of each row of units of the layer may be pruned in all: those that are, and those not
        protected. 0 for rows that other processes read."""
        return self._by_row(lambda part: self._pooled(part) < torch.inf)

    def pruned_units_by_row(self) -> np.ndarray:
        """How many units of each row of units of the layer are pruned already. 0 for rows that others read."""
        return self._by_row(lambda part: self._pruned(part.bits), scoring=False)

    def _by_row(self, test, scoring: bool = True) -> np.ndarray:
        counts = np.zeros(self.rows, dtype=np.int64)
        with torch.no_grad(), self._open(scoring=scoring) as parts:
            for part in self._cached(parts):
                found = test(part).flatten(1).sum(1).cpu().numpy()
                first = self._row_of(part)
                counts[first : first + len(found)] += found
        return counts

    def _row_of(self, part: _Part) -> int:
        """The number of a part's first row of units among those of the layer."""
        return part.place // (part.stride * self._height)

    def has_nan(self) -> bool:
        """Whether some score held is nan."""
        found = [bool(torch.isnan(chunk).any()) for chunk in self.chunks()]
        return any(found)

    def pruned_units(self) -> int:
        """How many of the units held are pruned already."""
        with torch.no_grad(), self._open(scoring=False) as parts:
            return sum(int(self._pruned(part.bits).sum()) for part in self._cached(parts))

    def _pruned(self, bits: torch.Tensor) -> torch.Tensor:
        """Which units of a part are pruned: those with no weight left."""
        if self.unit_size == 1:
            return (bits == 0).reshape(self.pattern.unit_shape(tuple(bits.shape)))
        return self.pattern.pruned_units(bits)

    def _write(self, bits: torch.Tensor, kept_U: torch.Tensor) -> None:
        mask = self.pattern.expand(kept_U, tuple(bits.shape))
        if self._shrink:
            bits.bitwise_and_(mask.to(torch.int8).neg_())
        else:
            bits.copy_(mask).neg_()

    # Parts of parts

    def _cached(self, parts: list[_Part]) -> Iterator[_Part]:
        """As many rows at a time as stay in a core's cache, in whole units."""
        for part in parts:
            rows = len(part.weight)
            if not part.weight.numel():
                continue
            high = self.pattern.unit_rows(rows)
            step = max(high, chunk_size(part.weight.device) // part.weight[0].numel() // high * high)
            for first in range(0, rows, step):
                yield part.rows(first, min(rows, first + step))

    def _some(self, parts: list[_Part], count: int) -> Iterator[_Part]:
        """About `count` of the units, evenly spread."""
        total = sum(part.weight.numel() for part in parts)
        for part in parts:
            if self._scattered and part.stride == 1:
                yield self._some_weights(part, max(1, round(count * part.weight.numel() / total)))
            else:
                yield self._some_rows(part, min(1.0, count / self.held))

    @staticmethod
    def _some_weights(part: _Part, count: int) -> _Part:
        weight, bits, stat = (
            spread(tensor.reshape(-1), count).reshape(-1, 1, 1) if tensor is not None else None
            for tensor in (part.weight, part.bits, part.stat)
        )
        rows, stride, run = places(part.weight.numel(), count)
        first = torch.arange(rows, device=weight.device)[:, None] * stride
        chosen = part.place + first + torch.arange(run, device=weight.device)
        return _Part(weight, bits, stat, part.place, 1, chosen.view(-1, 1, 1))

    def _some_rows(self, part: _Part, share: float) -> _Part:
        """A share of the rows of units, evenly spread."""
        rows = len(part.weight)
        high = self.pattern.unit_rows(rows)
        row_blocks = rows // high
        chosen = (
            torch.linspace(0, row_blocks - 1, max(1, round(share * row_blocks)), dtype=torch.float64).round().long()
        )
        index = (chosen[:, None] * high + torch.arange(high)).reshape(-1).to(part.weight.device)
        weight, bits, stat = (
            tensor[index] if tensor is not None else None for tensor in (part.weight, part.bits, part.stat)
        )
        inner = torch.arange(part.weight[0].numel(), device=weight.device).view(1, *weight.shape[1:])
        return _Part(
            weight, bits, stat, part.place, part.stride, part.place + index[:, None, None] * part.stride + inner
        )

    def _pooled(self, part: _Part) -> torch.Tensor:
        """Scores of the units of a part."""
        stat = part.places() + self._salt if self.criterion.requires & Requires.POSITION else part.stat
        scores = self._scored(part.weight, stat)
        if self._shrink and self.unit_size == 1:
            _fall(scores, part.bits)
        scores = self.pattern.pool(scores)
        # Not even a unit that the pattern protects comes back, so that every pruned one counts as fallen.
        if self._shrink and not self.pattern.flat:
            scores.masked_fill_(self._pruned(part.bits), -torch.inf)
        return scores

    def _scored(self, weight: torch.Tensor, stat: torch.Tensor | None) -> torch.Tensor:
        """The criterion's scores, float32 in memory of their own: they are written to, here and in `ranking`."""
        scores = self.criterion.score(weight, stat)
        if scores.shape != weight.shape:
            raise ValueError(
                f'criterion "{type(self.criterion).__name__}" must give one score per weight, but gives '
                f"{tuple(scores.shape)} for {tuple(weight.shape)}."
            )
        inputs = [tensor.untyped_storage().data_ptr() for tensor in (weight, stat) if tensor is not None]
        copy = scores.untyped_storage().data_ptr() in inputs
        return scores.detach().to(torch.float32, copy=copy)


def _fall(scores: torch.Tensor, bits: torch.Tensor) -> None:
    """Write -inf where `bits` is 0: ANDing and ORing bits is several times faster on CPUs than `masked_fill_`."""
    minus_infinity = (~bits).to(torch.int32).bitwise_and_(-0x800000)
    scores.view(torch.int32).bitwise_and_(bits).bitwise_or_(minus_infinity)
