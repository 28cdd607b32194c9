"""A group: some layers under one criterion, pattern, scope and schedule, and its prune step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..allocations import ALLOCATIONS, LayerSize
from ..config.pruning import PruningConfig
from ..criteria import CRITERIA, Criterion
from ..distributed import SINGLE_PROCESS, Communicator, Shard
from ..model.layers import PrunableLayer
from ..patterns import get_pattern
from ..schedulers import get_scheduler
from ..selection.budgets import largest_remainder
from ..selection.layer_scores import LayerScores
from ..selection.ranking import Threshold, find_thresholds
from ..statistics import GradientStatistic, all_finite
from .masks import MaskStore


logger = logging.getLogger(__name__)


class _Growth(Criterion):
    """What it is given is the score."""

    needs = "gradient"

    def score(self, weight, stat):
        return stat.clone()


class ParameterGroup:
    """Built from its options and layers; what pruning needs of the run (weights, masks) is passed in.

    Args:
        name: of the group.
        options: its own config, see `PruningConfig.resolve_groups`.
        layers: what it prunes. The pattern divides each.

    Raises:
        ValueError: units of different sizes would compete globally.
    """

    communicator: Communicator = SINGLE_PROCESS
    """Those that hold the weights between them."""

    def __init__(self, name: str, options: PruningConfig, layers: list[PrunableLayer]):
        self.name, self.options, self.layers = name, options, layers
        self.criterion: Criterion | None = CRITERIA[options.criterion]() if options.criterion else None
        """None where the solver chooses what falls."""
        self.pattern = get_pattern(options.pattern)
        self.scheduler = get_scheduler(options)
        self.target = options.target or 0.0
        self.stats: dict[str, GradientStatistic] = {}
        self.scope = options.scope or self._natural_scope()
        self._scattered = self.scope != "row"
        sizes = {layer.numel // self._units(layer) for layer in layers}
        if self.scope == "global" and len(sizes) > 1:
            raise ValueError(
                f'scope "global" ranks units of one size, but with pattern "{options.pattern}" they hold '
                f"{sorted(sizes)} weights: use scope=layer, or groups of layers with equal units."
            )

    def _natural_scope(self) -> str:
        if self.criterion is None or not self.pattern.has_rows:
            return "layer"
        if self.criterion.needs == "inputs":  # whose paper compares within each output
            return "row"
        return "global" if self.options.allocation == "uniform" else "layer"

    def _units(self, layer: PrunableLayer) -> int:
        shape = layer.matrix_shape
        return layer.num_matrices * torch.Size(self.pattern.unit_shape(shape)).numel()

    @property
    def requires_gradients(self) -> bool:
        """Whether the criterion sums up gradients."""
        return self.criterion is not None and self.criterion.needs == "gradient" and self.target > 0

    def observe(self, shards: Mapping[str, Shard]) -> None:
        """Add this step's gradients to the criterion's sums. A weight without a gradient adds nothing."""
        for layer in self.layers:
            shard = shards[layer.name]
            stat, weight, gradient = self.stats.get(layer.name), shard.tensor, shard.gradient
            if stat is None:
                stat = self.stats[layer.name] = GradientStatistic(weight, self.criterion.decay)
            if gradient is not None:
                stat.observe(weight, gradient, self.criterion.saliency)

    def restore(self, name: str, weight: torch.Tensor, total: torch.Tensor, counters: dict[str, int]) -> None:
        """Take up the sum of the weight `name`, as far as this process holds it, from a checkpoint."""
        self.stats[name] = GradientStatistic(weight, self.criterion.decay)
        self.stats[name].restore(total, counters)

    def ratio(self, prune_step: int, total: int, masks: MaskStore) -> float:
        """The sparsity that the schedule asks for at this prune step.

        Raises:
            ValueError: it is not from 0 to the target.
        """
        ratio = self.scheduler.update_sparsity_ratio(self.target, prune_step, total, masks)
        if not 0 <= ratio <= self.target + 1e-9:
            raise ValueError(
                f"{type(self.scheduler).__name__} asks for sparsity {ratio} at prune step {prune_step} of {total}: it "
                f"must be from 0 to the target, {self.target}."
            )
        return ratio

    def ready(self) -> bool:
        """Whether there is something to rank by."""
        seen = any(stat.count for stat in self.stats.values())
        return not self.requires_gradients or self.communicator.any(seen)

    def prune(self, prune_step: int, total: int, shards: Mapping[str, Shard], masks: MaskStore) -> float:
        """Bring the masks to this prune step's sparsity, in all processes at once. Returns it."""
        if not self.target:
            return 0.0  # Only the zeros that the weights came with are locked.
        ratio = self.ratio(prune_step, total, masks)
        if prune_step == 1:
            self._warn_of_idle()
        scores = [self._scores(layer, shards[layer.name], masks) for layer in self.layers]
        floors, caps = self._bounds(scores, ratio)
        wanted = self._wanted(ratio, floors, caps)
        try:
            if self.scope == "row":
                self._prune_rows(scores, wanted, floors, caps)
            elif wanted:
                self._prune_units(scores, wanted, floors, caps, self._exchange(prune_step, total, shards))
        except ValueError as error:
            found = self.communicator.sum_counts(np.array([layer.has_nan() for layer in scores], dtype=np.int64))
            broken = [f'"{layer.layer.name}"' for layer, count in zip(scores, found, strict=True) if count]
            reason = f"scores are nan in {', '.join(broken)}" if broken else error
            raise ValueError(f'group "{self.name}", criterion "{self.options.criterion}": {reason}') from error
        for stat in self.stats.values() if not getattr(self.criterion, "persistent", True) else ():
            stat.renew()
        return ratio

    def _warn_of_idle(self) -> None:
        """Say which weights have had no gradient: they score 0, and so fall first."""
        idle = [name for name, stat in self.stats.items() if not stat.count and stat.total.numel()]
        if idle:
            logger.warning(
                'the loss does not reach %s, so criterion "%s" prunes these first: exclude what should stay.',
                ", ".join(idle),
                self.options.criterion,
            )

    def _scores(self, layer: PrunableLayer, shard: Shard, masks: MaskStore) -> LayerScores:
        stat = self.stats[layer.name].total if layer.name in self.stats else None
        bits, communicator = masks.bits(layer.name), self.communicator
        return LayerScores(layer, self.criterion, self.pattern, shard, bits, stat, self._scattered, communicator)

    # How many units of each layer

    def _bounds(self, scores: list[LayerScores], ratio: float) -> tuple[list[int], list[int]]:
        """The fewest and most units of each layer that may be pruned now. A floor grows with the schedule, and what
        is pruned stays pruned."""
        gone = self.communicator.sum_counts(np.array([layer.pruned_units() for layer in scores])).tolist()
        floors, caps = self._limits(gone, ratio)
        if self.pattern.max_sparsity < 1:
            caps = [int(room.sum()) for room in self._rooms_by_row(scores)]
        return floors, caps

    def _limits(self, gone: list[int], ratio: float) -> tuple[list[int], list[int]]:
        least, most = self.options.min_sparsity_per_layer or 0.0, self.options.max_sparsity_per_layer
        least *= ratio / self.target if self.target else 0.0
        most = min(1.0 if most is None else most, self.pattern.max_sparsity)
        floors, caps = [], []
        for layer, pruned in zip(self.layers, gone, strict=True):
            units = self._units(layer)
            floors.append(max(pruned, int(least * units + 1e-9)))
            caps.append(max(pruned, math.ceil(most * units - 1e-9)))
        return floors, caps

    def _wanted(self, ratio: float, floors: list[int], caps: list[int]) -> int:
        """How many units are to be pruned in all."""
        units = sum(map(self._units, self.layers))
        return sum(caps) if ratio >= self.pattern.max_sparsity - 1e-9 else max(round(ratio * units), sum(floors))

    def _rooms_by_row(self, scores: list[LayerScores]) -> list[np.ndarray]:
        """How many units of each row of each layer may be pruned in all. Only zeros locked from before make rows
        differ."""
        most = self.pattern.max_sparsity
        if self.options.keep_zeros and most < 1:
            return self._sums([layer.prunable_units_by_row() for layer in scores])
        return [np.full(layer.rows, round(most * (layer.numel // layer.rows))) for layer in scores]

    def _counts(
        self, wanted: int, floors: list[int], caps: list[int], outliers: Mapping[str, float] | None = None
    ) -> list[int]:
        """How many units of each layer are to be pruned, `wanted` in all."""
        sizes = []
        for layer, floor, cap in zip(self.layers, floors, caps, strict=True):
            rows, positions, columns = layer.matrix_shape
            units = self._units(layer)
            known = {"least": floor / units, "most": cap / units, "outliers": (outliers or {}).get(layer.name)}
            sizes.append(LayerSize(layer.name, units, rows, columns, positions, **known))
        share = wanted / sum(size.units for size in sizes)
        shares = ALLOCATIONS[self.options.allocation](share, sizes)
        return largest_remainder(wanted, [shares[size.name] * size.units for size in sizes], floors, caps).tolist()

    # One layer at a time, which one-shot pruning does

    def prune_counts(self, gone: Mapping[str, int], outliers: Mapping[str, float]) -> dict[str, int]:
        """How many units of each layer are to be pruned in all, where each is decided by itself.

        Args:
            gone: how many units of a layer are pruned already; 0 where not named.
            outliers: a layer's share of outliers, where the allocation needs it.
        """
        pruned = [gone.get(layer.name, 0) for layer in self.layers]
        floors, caps = self._limits(pruned, self.target)
        counts = self._counts(self._wanted(self.target, floors, caps), floors, caps, outliers)
        return {layer.name: count for layer, count in zip(self.layers, counts, strict=True)}

    def pruned_units(self, layer: PrunableLayer, weight: torch.Tensor) -> int:
        """How many units of a layer are zero."""
        return sum(int(self.pattern.fallen(matrix != 0).sum()) for matrix in layer.matrices(weight.detach()))

    def prune_layer(self, scores: LayerScores, count: int) -> None:
        """Prune the lowest units of one layer, `count` in all or, of N:M, as many as the pattern asks for: of each row
        as many (scope row), or wherever they are."""
        rooms = self._rooms_by_row([scores])[0]
        count = int(rooms.sum()) if self.pattern.max_sparsity < 1 else count
        if self.scope == "row":
            gone = scores.pruned_units_by_row()
            scores.write_rows(
                torch.from_numpy(largest_remainder(count, [count / scores.rows] * scores.rows, gone, rooms))
            )
        else:
            self._write([scores], self._each_lowest([scores], [count]))

    # Which units

    def _prune_units(self, scores, wanted: int, floors: list[int], caps: list[int], exchange: float) -> None:
        """Scope global and layer. With `exchange`, that share of the kept units falls on top, and of all that are
        pruned then, as many grow back: those with the largest gradient."""
        # Scores see to the other bounds: what is pruned is -inf and falls first, what is protected is +inf.
        least = floors if self.options.min_sparsity_per_layer else None
        most = caps if self.options.max_sparsity_per_layer is not None else None
        if self.scope == "global":
            units = sum(layer.numel for layer in scores)
            extra = min(round(exchange * (units - wanted)), sum(caps) - wanted)
            cuts = find_thresholds(scores, wanted + extra, least, most, self.communicator)
        else:
            counts = self._counts(wanted, floors, caps)
            rooms = zip(scores, counts, caps, strict=True)
            more = [min(round(exchange * (layer.numel - count)), cap - count) for layer, count, cap in rooms]
            extra = sum(more)
            cuts = self._each_lowest(scores, [count + plus for count, plus in zip(counts, more, strict=True)])
        self._write(scores, cuts)
        if extra:
            growth = [self._growth(layer) for layer in scores]
            if self.scope == "global":
                self._write(growth, find_thresholds(growth, wanted, least, most, self.communicator))
            else:
                self._write(growth, self._each_lowest(growth, counts))

    def _each_lowest(self, scores: list[LayerScores], counts: list[int]) -> list[Threshold]:
        """Cuts for exactly counts[l] units of each layer l; all at once, which shares them out over threads."""
        return find_thresholds(scores, sum(counts), counts, counts, self.communicator)

    def _write(self, scores: list[LayerScores], cuts: list[Threshold]) -> None:
        for layer, cut in zip(scores, _localized(scores, cuts, self.communicator), strict=True):
            layer.write_threshold(cut)

    def _prune_rows(self, scores: list[LayerScores], wanted: int, floors: list[int], caps: list[int]) -> None:
        """Scope row: within a layer every row of units loses the same number, as far as whole units allow."""
        counts, rooms = self._counts(wanted, floors, caps), self._rooms_by_row(scores)
        pruned, error = self._sums([layer.pruned_units_by_row() for layer in scores]), None
        for layer, count, gone, room in zip(scores, counts, pruned, rooms, strict=True):
            rows = largest_remainder(count, [count / layer.rows] * layer.rows, gone, room)
            try:
                layer.write_rows(torch.from_numpy(rows))
            except ValueError as problem:  # Go on: others wait for what this process has of the next layers.
                error = error or problem
        self.communicator.raise_together(error)

    def _sums(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """The sum of every process's array, for several at once."""
        ends = np.cumsum([len(array) for array in arrays])[:-1]
        return np.split(self.communicator.sum_counts(np.concatenate(arrays)), ends)

    # Regrowing

    def _exchange(self, prune_step: int, total: int, shards: Mapping[str, Shard]) -> float:
        """Which share of the kept units this prune step exchanges."""
        share = self.options.regrow * (1 - prune_step / total)
        gradients = [shards[layer.name].gradient for layer in self.layers] if share else []
        unusable = any(gradient is None for gradient in gradients) or not all_finite(gradients)
        if self.communicator.any(unusable):
            logger.warning("prune step %d of group %s regrows nothing: no finite gradients.", prune_step, self.name)
            return 0.0
        return share

    def _growth(self, pruned: LayerScores) -> LayerScores:
        """The scores by which pruned units grow back: |gradient|; what is kept stays kept."""
        gradient = pruned.shard.gradient.detach().float().abs().masked_fill_(pruned.bits != 0, torch.inf)
        rest = self._scattered, self.communicator
        return LayerScores(
            pruned.layer, _Growth(), self.pattern, pruned.shard, pruned.bits, gradient, *rest, shrink=False
        )


def _localized(
    scores: Sequence[LayerScores], cuts: Sequence[Threshold], communicator: Communicator
) -> list[Threshold]:
    """The same cuts with this process's share of the ties. Runs of units that lie in a row are told of, not units."""
    split = [
        index
        for index, (layer, cut) in enumerate(zip(scores, cuts, strict=True))
        if communicator.world_size > 1 and 0 < cut.ties < layer.numel and not cut.entire
    ]
    if not split:
        return list(cuts)
    runs = []
    for index in split:
        starts, counts = scores[index].tied(cuts[index].value)
        runs.append(np.stack([np.full_like(starts, index), starts, counts], axis=1))
    told = communicator.all_gather(torch.from_numpy(np.concatenate(runs).reshape(-1)))
    owners = np.repeat(np.arange(len(told)), [len(part) // 3 for part in told])
    layers, starts, counts = torch.cat(told).view(-1, 3).numpy().T
    cuts = list(cuts)
    for index in split:
        order = np.flatnonzero(layers == index)
        order = order[np.argsort(starts[order])]
        before = np.cumsum(counts[order]) - counts[order]
        falling = np.clip(cuts[index].ties - before, 0, counts[order])
        own = falling[owners[order] == scores[index].holder].sum()
        cuts[index] = Threshold(cuts[index].value, int(own))
    return cuts
