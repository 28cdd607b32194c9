"""The scores of one layer's units, computed part by part whenever they are read; masks are written the same way."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from .criteria import Criterion
from .patterns import Pattern
from .ranking import CHUNK, CHUNK_ON_ACCELERATOR, Cut, keep, lowest_per_row, places, spread
from .targets import Layer


class LayerScores:
    """One layer under one criterion and pattern; what `ranking` reads.

    A unit that is pruned already scores -inf, so it falls before any other, and one that the pattern protects scores
    +inf. Nothing of the weight's size is ever stored.

    Args:
        layer: where the weight is and how it is laid out.
        weight, bits: the weight and its mask (int8, 0 where pruned), of the layer's shape.
        stat: what the criterion needs of the layer, of its shape; None if nothing.
        scattered: whether single weights compete whatever their place, so that the layout does not matter.
        shrink: whether masks may only lose weights; if not, pruned weights are ranked like any other.
    """

    def __init__(
        self,
        layer: Layer,
        criterion: Criterion,
        pattern: Pattern,
        weight: torch.Tensor,
        bits: torch.Tensor,
        stat: torch.Tensor | None,
        scattered: bool,
        shrink: bool = True,
    ):
        self.layer, self.criterion, self.pattern = layer, criterion, pattern
        self.weight, self.bits = weight, bits
        self._shrink = shrink
        self._scattered = scattered and pattern.flat
        self._weights, self._bits = self._matrices(weight), self._matrices(bits)
        self._stats = [None] * len(self._weights) if stat is None else self._matrices(stat)
        shapes = [pattern.unit_shape(tuple(matrix.shape)) for matrix in self._weights]
        self.numel = sum(torch.Size(shape).numel() for shape in shapes)
        self.unit_size = layer.numel // self.numel
        self.rows = sum(shape[0] for shape in shapes)
        self._salt = zlib.crc32(layer.name.encode()) << 31

    def _matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        tensor = tensor.detach()
        return [tensor.reshape(-1)[:, None, None]] if self._scattered else self.layer.matrices(tensor)

    # What ranking reads

    def chunks(self) -> Iterator[torch.Tensor]:
        """Scores of the units in position order, 1-D float32."""
        with torch.no_grad():
            for part in self._parts():
                yield self._pooled(*part).reshape(-1)

    def sample(self, count: int) -> torch.Tensor:
        """About `count` of the scores, from places spread evenly over the layer."""
        with torch.no_grad():
            if self._scattered:
                parts = [self._some_weights(count)]
            else:
                share = min(1.0, count / self.numel)
                parts = [self._some_rows(*matrix, share) for matrix in self._enumerate()]
            sampled = [self._pooled(*part).reshape(-1) for part in parts]
        return torch.cat(sampled)

    # What the pruner writes

    def write_cut(self, cut: Cut) -> None:
        """Prune the units that `cut` lets fall, and keep all others."""
        ties = cut.ties
        with torch.no_grad():
            for weight, bits, stat, offset in self._parts():
                scores = self._pooled(weight, bits, stat, offset)
                kept, ties = keep(scores.reshape(-1), cut, ties)
                self._write(bits, kept.view(scores.shape))

    def write_rows(self, counts: torch.Tensor) -> None:
        """Prune the lowest counts[r] units of each row r of units."""
        first = 0
        with torch.no_grad():
            for weight, bits, stat, offset in self._parts():
                scores = self._pooled(weight, bits, stat, offset)
                rows = scores.flatten(1)
                kept = lowest_per_row(rows, counts[first : first + len(rows)])
                self._write(bits, kept.view(scores.shape))
                first += len(rows)

    def prunable_units_by_row(self) -> torch.Tensor:
        """How many units of each row of units may be pruned in all: those that are, and those not protected."""
        with torch.no_grad():
            return torch.cat([(self._pooled(*part) < torch.inf).flatten(1).sum(1) for part in self._parts()])

    def has_nan(self) -> bool:
        """Whether some score is nan."""
        return any(bool(torch.isnan(chunk).any()) for chunk in self.chunks())

    def pruned_units_by_row(self) -> torch.Tensor:
        """How many units of each row of units are pruned already."""
        with torch.no_grad():
            return torch.cat([self._pruned(bits).flatten(1).sum(1) for _, bits, _, _ in self._parts()])

    def pruned_units(self) -> int:
        """How many units are pruned already."""
        with torch.no_grad():
            return sum(int(self._pruned(bits).sum()) for _, bits, _, _ in self._parts())

    def _pruned(self, bits: torch.Tensor) -> torch.Tensor:
        """Which units of a part are pruned: those with no weight left."""
        if self.unit_size == 1:
            return (bits == 0).reshape(self.pattern.unit_shape(tuple(bits.shape)))
        return self.pattern.pool(bits.float()) == 0

    def _write(self, bits: torch.Tensor, kept_U: torch.Tensor) -> None:
        mask = self.pattern.expand(kept_U, tuple(bits.shape))
        if self._shrink:
            bits.bitwise_and_(mask.to(torch.int8).neg_())
        else:
            bits.copy_(mask).neg_()

    # Parts

    def _enumerate(self) -> Iterator[tuple]:
        """(weight, bits, stat, position of the first weight) of each matrix."""
        offset = 0
        for weight, bits, stat in zip(self._weights, self._bits, self._stats, strict=True):
            yield weight, bits, stat, offset
            offset += weight.numel()

    def _parts(self) -> Iterator[tuple]:
        """The same for each part: as many rows as stay in a core's cache, in whole units."""
        for weight, bits, stat, offset in self._enumerate():
            rows, per_row = weight.shape[0], weight[0].numel()
            high = self.pattern.unit_rows(rows)
            chunk = CHUNK_ON_ACCELERATOR if weight.is_cuda else CHUNK
            step = max(high, chunk // per_row // high * high)
            for first in range(0, rows, step):
                last = min(rows, first + step)
                part = stat[first:last] if stat is not None else None
                yield weight[first:last], bits[first:last], part, offset + first * per_row

    def _some_weights(self, count: int) -> tuple:
        """About `count` of the scattered weights, evenly spread, as a part."""
        weight, bits, stat = (
            spread(tensor.reshape(-1), count).reshape(-1, 1, 1) if tensor is not None else None
            for tensor in (self._weights[0], self._bits[0], self._stats[0])
        )
        rows, stride, run = places(self.numel, count)
        first = torch.arange(rows, device=weight.device)[:, None] * stride
        positions = first + torch.arange(run, device=weight.device)
        return weight, bits, stat, positions.view(-1, 1, 1)

    def _some_rows(self, weight, bits, stat, offset, share: float) -> tuple:
        """A share of the rows of units of one matrix, evenly spread, as a part."""
        rows = weight.shape[0]
        high = self.pattern.unit_rows(rows)
        bands = rows // high
        count = max(1, round(share * bands))
        chosen = torch.linspace(0, bands - 1, count, dtype=torch.float64).round().long()
        index = (chosen[:, None] * high + torch.arange(high)).reshape(-1).to(weight.device)
        positions = torch.arange(weight[0].numel(), device=weight.device).view(1, *weight.shape[1:])
        positions = offset + index[:, None, None] * weight[0].numel() + positions
        return weight[index], bits[index], stat[index] if stat is not None else None, positions

    def _pooled(self, weight, bits, stat, offset) -> torch.Tensor:
        """Scores of the units of a part; `offset` is its first position, or the positions of all its weights."""
        if self.criterion.needs == "position":
            if not isinstance(offset, torch.Tensor):
                offset = offset + torch.arange(weight.numel(), device=weight.device).view(weight.shape)
            stat = offset + self._salt
        scores = self._scored(weight, stat)
        if self._shrink and self.unit_size == 1:
            _fall(scores, bits)
        scores = self.pattern.pool(scores)
        # Not even a unit that the pattern protects comes back, so that every pruned one counts as fallen.
        if self._shrink and not self.pattern.flat:
            scores.masked_fill_(self._pruned(bits), -torch.inf)
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
