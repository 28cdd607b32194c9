"""ParameterGroup: layers that are pruned by the same options, their statistics, and their prune step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from ..algorithms.dynamic import DynamicSparsity
from ..allocations import LayerSize
from ..config import ResolvedGroup
from ..criteria import Criterion, GradientHistoryCriterion, ObservingCriterion
from ..distributed import SINGLE_PROCESS, Communicator, Shard
from ..model.layers import PrunableLayer
from ..numerics import gather_counts
from ..requires import Requires
from ..selection.apply import apply_thresholds
from ..selection.budgets import largest_remainder
from ..selection.exchange import exchange_units
from ..selection.layer_scores import LayerScores
from ..selection.threshold import Threshold, find_thresholds
from ..selection.ties import split_ties
from ..statistics import GradientHistory, GradientStatistic, ObservedGradients, all_finite
from .block_scores import BlockScores
from .masks import MaskStore, zero_counts
from .unreached_layers import warn_of_unreached


logger = logging.getLogger(__name__)


class _GivenScores(Criterion):
    """The statistic is the score."""

    requires = Requires.GRADIENTS

    def score(self, weight: torch.Tensor, statistic: Any) -> torch.Tensor:
        return statistic.clone()


class _Budget(NamedTuple):
    """The number of units to prune in all, and the least and most of each layer; None means no bound."""

    total: int
    floors: list[int] | None
    caps: list[int] | None


class ParameterGroup:
    """The layers of one group, with the statistics of their criterion.

    Args:
        options: the resolved options of the group, with its layers.
        communicator: the ranks that hold the weights.
    """

    def __init__(self, options: ResolvedGroup, communicator: Communicator = SINGLE_PROCESS):
        self.options, self.communicator = options, communicator
        self.name, self.layers, self.pattern, self.scope = options.name, options.layers, options.pattern, options.scope
        self.criterion, self.target = options.criterion, options.target
        self.dynamic = options.algorithm if isinstance(options.algorithm, DynamicSparsity) else None
        """The algorithm, where weights return at prune steps."""
        self.statistics: dict[str, ObservedGradients] = {}

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that has a mask, by name."""
        return self.options.parameter_shapes

    @property
    def unit_counts(self) -> list[int]:
        """The number of units of each layer, or of each group of coupled units."""
        return [self.options.num_units(layer) for layer in self.layers]

    def keep_zeros(self, shards: Mapping[str, Shard], masks: MaskStore) -> None:
        """Sets the masks to the zeros that the weights have, on all ranks at once."""
        for layer in self.layers:
            masks.replace(layer.name, shards[layer.name].tensor != 0)

    @property
    def requires_gradients(self) -> bool:
        """Whether the criterion sums over gradients."""
        return bool(self.options.requires & Requires.GRADIENTS)

    @property
    def required_criterion(self) -> Criterion:
        """The criterion of a group that is pruned by scores.

        Raises:
            ValueError: the solver selects the pruned units.
        """
        if self.criterion is None:
            raise ValueError(
                f'group "{self.name}" has no criterion: solver "{self.options.solver_name}" selects the units'
            )
        return self.criterion

    def observe(self, shards: Mapping[str, Shard]) -> None:
        """Adds the gradients of one optimizer step to the statistics. A weight without a gradient adds nothing."""
        if not isinstance(self.criterion, ObservingCriterion):
            return
        observations = []
        for layer in self.layers:
            shard = shards[layer.name]
            weight, gradient = shard.tensor, shard.gradient
            if layer.name not in self.statistics:
                self.statistics[layer.name] = self.criterion.new_statistic(weight)
            if gradient is not None:
                observations.append((self.statistics[layer.name], weight, gradient))
        self.criterion.observe(observations)

    def new_statistic(self, weight: torch.Tensor) -> ObservedGradients:
        """Returns an empty statistic of a weight, the part that this rank holds, for a criterion that has one."""
        return cast(ObservingCriterion, self.criterion).new_statistic(weight)

    def ratio(self, prune_step: int, total_steps: int, masks: MaskStore) -> float:
        """Returns the sparsity after this prune step, 0 for the start, as the scheduler or the algorithm sets it.

        Raises:
            ValueError: the scheduler returns a sparsity outside of 0 to the target.
        """
        scheduled = self._scheduled_ratio(prune_step, total_steps, masks) if prune_step else 0.0
        if self.dynamic is None:
            return scheduled
        return self.dynamic.sparsity(scheduled, self.target, prune_step, total_steps)

    def _scheduled_ratio(self, prune_step: int, total_steps: int, masks: MaskStore) -> float:
        scheduler = self.options.scheduler
        # The seed API says dict; a MaskStore is a mapping that makes each bool mask when it is read.
        value: object = scheduler.update_sparsity_ratio(self.target, prune_step, total_steps, cast(dict, masks))
        try:
            ratio = float(cast(float, value))
        except (TypeError, ValueError, RuntimeError):
            ratio = math.nan
        if not 0 <= ratio <= self.target + 1e-9:
            raise ValueError(
                f"{type(scheduler).__name__} returns sparsity {value} at prune step {prune_step} of {total_steps}: it "
                f"must be a number from 0 to the target, {self.target}."
            )
        return ratio

    def ready(self) -> bool:
        """Whether the statistics hold at least one observation, on some rank."""
        observed = any(statistic.count for statistic in self.statistics.values())
        return not self.requires_gradients or self.communicator.any(observed)

    def prune(
        self,
        prune_step: int,
        total_steps: int,
        shards: Mapping[str, Shard],
        masks: MaskStore,
        statistics: Mapping[str, torch.Tensor] | None = None,
        gradients: Mapping[str, torch.Tensor | None] | None = None,
    ) -> float:
        """Updates the masks to the scheduled sparsity, on all ranks at once.

        Args:
            prune_step, total_steps: this prune step, from 1, of how many.
            shards: the local part of each weight by name.
            masks: the masks of the local parts, which are updated.
            statistics: what the criterion requires, by layer name, where it is not the group's own sum of gradients.
            gradients: of the local parts, by name, where the algorithm reads them at prune steps.

        Returns:
            The scheduled sparsity.

        Raises:
            ValueError: scores are nan; the layers are named.
        """
        if not self.target:
            return 0.0  # Only the zeros that the weights had at the start are kept.
        ratio, known = self._start_prune_step(prune_step, total_steps, shards, masks, statistics)
        before = self._mask_bits_to_update(masks)
        scores = [self._layer_scores(layer, shards[layer.name], masks, known.get(layer.name)) for layer in self.layers]
        floors, caps = self._current_bounds(scores, ratio)
        total = self._num_pruned(ratio, floors, caps)
        with self._naming_nan_scores(scores, f'criterion "{self.options.criterion_name}"'):
            if self.scope == "row":
                self._prune_rows(scores, total, floors, caps)
            elif total:
                budget = self._budget(total, floors, caps)
                self._apply_thresholds(scores, find_thresholds(scores, *budget, self.communicator))
            if self.dynamic is not None and ratio:
                fraction = self.dynamic.exchanged_fraction(prune_step, total_steps)
                self._exchange(fraction, self.dynamic.growth(prune_step), ratio, scores, gradients or {})
        self._update_weights(shards, masks, before)
        self._restart_statistics()
        return ratio

    def prune_initially(self, shards: Mapping[str, Shard], masks: MaskStore) -> None:
        """Prunes to the target before training, on all ranks at once, where the algorithm starts sparse.

        Args:
            shards: the local part of each weight by name.
            masks: the masks of the local parts, which are updated.
        """
        criterion = None if self.dynamic is None else self.dynamic.initial_criterion
        if criterion is None or not self.target:
            return
        scores = [self._layer_scores(layer, shards[layer.name], masks, None, criterion) for layer in self.layers]
        with self._naming_nan_scores(scores, f'algorithm "{self.options.algorithm_name}"'):
            floors, caps = self._current_bounds(scores, self.target)
            self._prune_lowest(scores, self._num_pruned(self.target, floors, caps), floors, caps)

    def _prune_lowest(self, scores: list[LayerScores], total: int, floors: list[int], caps: list[int]) -> None:
        if self.scope == "row":
            self._prune_rows(scores, total, floors, caps)
        else:
            budget = self._budget(total, floors, caps)
            self._apply_thresholds(scores, find_thresholds(scores, *budget, self.communicator))

    def select(
        self,
        prune_step: int,
        total_steps: int,
        scores: Mapping[str, torch.Tensor],
        shards: Mapping[str, Shard],
        masks: MaskStore,
    ) -> float:
        """Replaces the masks: the lowest units by given scores are pruned, to the scheduled sparsity, on all ranks at
        once. Units that were pruned before may return.

        Args:
            prune_step, total_steps: this prune step, from 1, of how many.
            scores: (any shape) float32 of each layer by name, of the shape of its shard's tensor; not modified.
            shards: the local part of each weight by name.
            masks: the masks of the local parts, which are replaced.

        Returns:
            The scheduled sparsity.

        Raises:
            ValueError: scores are nan; the layers are named.
        """
        if not self.target:
            return 0.0
        ratio = self.ratio(prune_step, total_steps, masks)
        layers = [
            self._given_scores(layer, shards[layer.name], masks, scores[layer.name].detach()) for layer in self.layers
        ]
        floors, caps = self._bounds([0] * len(layers), ratio)
        if self.pattern.max_sparsity < 1:
            caps = [int(room.sum()) for room in self._prunable_by_row(layers)]
        total = self._num_pruned(ratio, floors, caps)
        with self._naming_nan_scores(layers, f'algorithm "{self.options.algorithm_name}"'):
            self._prune_lowest(layers, total, floors, caps)
        return ratio

    @contextmanager
    def _naming_nan_scores(self, scores: Sequence[LayerScores], method: str) -> Iterator[None]:
        """Within, a ValueError names the layers whose scores are nan, if there are any. All ranks raise together."""
        try:
            yield
        except ValueError as error:
            counts = self.communicator.sum_counts(np.array([layer.has_nan() for layer in scores], dtype=np.int64))
            names = [f'"{layer.name}"' for layer, count in zip(self.layers, counts, strict=True) if count]
            reason = f"scores are nan in {', '.join(names)}" if names else error
            raise ValueError(f'group "{self.name}", {method}: {reason}') from error

    def _start_prune_step(
        self,
        prune_step: int,
        total_steps: int,
        shards: Mapping[str, Shard],
        masks: MaskStore,
        statistics: Mapping[str, torch.Tensor] | None,
    ) -> tuple[float, Mapping[str, torch.Tensor]]:
        """Returns the scheduled sparsity, and what the criterion requires, by layer name."""
        ratio = self.ratio(prune_step, total_steps, masks)
        if prune_step == 1:
            self._warn_without_gradients(shards)
        if self.dynamic is not None and self.dynamic.opens_masks(prune_step, total_steps):
            for name in self.parameter_shapes:
                masks.open(name)
        if statistics is None:
            statistics = self.scored_statistics(shards, masks)
        return ratio, statistics

    def scored_statistics(self, shards: Mapping[str, Shard], masks: MaskStore) -> dict[str, torch.Tensor]:
        """Returns what the criterion's `score` gets of what was observed, by layer name."""
        if isinstance(self.criterion, GradientHistoryCriterion):
            return {
                layer.name: self._block_scores(layer, shards[layer.name]).weight_scores(masks.bits(layer.name))
                for layer in self.layers
            }
        return {name: statistic.total for name, statistic in self.gradient_sums.items()}

    @property
    def gradient_sums(self) -> dict[str, GradientStatistic]:
        """The statistics that a `GradientCriterion` sums up over optimizer steps, by layer name."""
        known = self.statistics.items()
        return {name: statistic for name, statistic in known if isinstance(statistic, GradientStatistic)}

    def _block_scores(self, layer: PrunableLayer, shard: Shard) -> BlockScores:
        criterion = cast(GradientHistoryCriterion, self.criterion)
        history = cast(GradientHistory, self.statistics.get(layer.name) or criterion.new_statistic(shard.tensor))
        return BlockScores(criterion, self.pattern, layer, shard, history, self.communicator)

    @property
    def updates_weights(self) -> bool:
        """Whether prune steps update the weights that remain, in shards only: the caller copies them."""
        return isinstance(self.criterion, GradientHistoryCriterion) and self.criterion.updates_weights

    def _mask_bits_to_update(self, masks: MaskStore) -> dict[str, torch.Tensor]:
        """Returns copies of the masks by layer name, for `_update_weights`; none where no weight is updated."""
        return {layer.name: masks.bits(layer.name).clone() for layer in self.layers if self.updates_weights}

    def _update_weights(
        self, shards: Mapping[str, Shard], masks: MaskStore, before: Mapping[str, torch.Tensor]
    ) -> None:
        """Updates the weights that a prune step has left, given the masks before it."""
        for layer in self.layers:
            if layer.name in before:
                blocks = self._block_scores(layer, shards[layer.name])
                blocks.update_weight(before[layer.name], masks.bits(layer.name))

    def _restart_statistics(self) -> None:
        """Restarts the sums that a prune step has used, where the criterion does not keep them."""
        if not getattr(self.criterion, "persistent", True):
            for statistic in self.statistics.values():
                statistic.restart()

    def _warn_without_gradients(self, shards: Mapping[str, Shard]) -> None:
        """Warns of weights without a gradient: they score 0, and are pruned first."""
        known = self.statistics.items()
        names = [name for name, statistic in known if not statistic.count and shards[name].tensor.numel()]
        warn_of_unreached(names, f'criterion "{self.options.criterion_name}"')

    def _layer_scores(
        self,
        layer: PrunableLayer,
        shard: Shard,
        masks: MaskStore,
        statistic: torch.Tensor | None,
        criterion: Criterion | None = None,
    ) -> LayerScores:
        bits, by_row = masks.bits(layer.name), self.scope == "row"
        rest = shard, bits, statistic, by_row, self.communicator
        return LayerScores(layer, criterion or self.required_criterion, self.pattern, *rest)

    # The number of units to prune in each layer

    def _current_bounds(self, scores: list[LayerScores], ratio: float) -> tuple[list[int], list[int]]:
        """Returns the fewest and the most pruned units of each layer at this sparsity, given those pruned before."""
        if all(layer.unit_size == 1 for layer in scores):
            counts = zero_counts([layer.mask_bits if layer.shard.is_primary else None for layer in scores])
        else:
            counts = gather_counts([layer.num_pruned() for layer in scores])
        pruned = self.communicator.sum_counts(counts).tolist()
        floors, caps = self._bounds(pruned, ratio)
        if self.pattern.max_sparsity < 1:
            caps = [int(room.sum()) for room in self._prunable_by_row(scores)]
        return floors, caps

    def _bounds(self, pruned: Sequence[int], ratio: float) -> tuple[list[int], list[int]]:
        """The minimum sparsity grows with the schedule; what is pruned remains pruned. A maximum below 1 leaves each
        layer a unit, as far as the target permits."""
        least = self.options.min_sparsity_per_layer * (ratio / self.target if self.target else 0.0)
        most = min(self.options.max_sparsity_per_layer, self.pattern.max_sparsity)
        sizes = self.unit_counts
        floors = [max(count, int(least * units + 1e-9)) for units, count in zip(sizes, pruned, strict=True)]
        rounded = [math.ceil(most * units - 1e-9) for units in sizes]
        caps = [min(cap, units - (most < 1)) for cap, units in zip(rounded, sizes, strict=True)]
        if sum(caps) < self.target * sum(sizes) - 1e-9:
            caps = rounded
        return floors, [max(count, cap) for count, cap in zip(pruned, caps, strict=True)]

    def _num_pruned(self, ratio: float, floors: list[int], caps: list[int]) -> int:
        """Returns the number of pruned units of all layers at this sparsity."""
        units = sum(self.unit_counts)
        return sum(caps) if ratio >= self.pattern.max_sparsity - 1e-9 else max(round(ratio * units), sum(floors))

    def _prunable_by_row(self, scores: list[LayerScores]) -> list[np.ndarray]:
        """Returns the most pruned units of each row of each layer. Rows differ only by zeros that are kept."""
        most = self.pattern.max_sparsity
        if self.options.keep_zeros and most < 1:
            return self._sum_over_ranks([layer.num_prunable_by_row() for layer in scores])
        return [np.full(layer.num_rows, round(most * (layer.numel // layer.num_rows))) for layer in scores]

    def _allocate(
        self, total: int, floors: list[int], caps: list[int], measured: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Distributes `total` pruned units over the layers."""
        sizes = []
        for layer, floor, cap in zip(self.layers, floors, caps, strict=True):
            rows, positions, columns = layer.matrix_shape
            units, value = self.options.num_units(layer), (measured or {}).get(layer.name)
            sizes.append(LayerSize(layer.name, units, rows, columns, positions, floor / units, cap / units, value))
        shares = self.options.allocation.allocate(total / sum(size.units for size in sizes), sizes)
        return largest_remainder(total, [shares[size.name] * size.units for size in sizes], floors, caps).tolist()

    def _budget(self, total: int, floors: list[int], caps: list[int]) -> _Budget:
        """Returns how many units to prune in all and of each layer."""
        if self.scope == "global":
            # Pruned units score -inf and protected ones inf, which keeps the other bounds.
            return _Budget(total, *self._global_bounds(floors, caps))
        counts = self._allocate(total, floors, caps)
        return _Budget(total, counts, counts)

    def _global_bounds(self, floors: list[int], caps: list[int]) -> tuple[list[int] | None, list[int] | None]:
        """Returns the bounds that options set, None for those that scores keep by themselves."""
        least = floors if self.options.min_sparsity_per_layer else None
        most = caps if self.options.max_sparsity_per_layer < 1 else None
        return least, most

    # One layer at a time, as in one-shot pruning

    def prune_counts(self, pruned: Mapping[str, int], measured: Mapping[str, Any]) -> dict[str, int]:
        """Returns the number of units to prune in each layer, including those pruned before.

        Args:
            pruned: how many units of a layer are pruned already; 0 where not named.
            measured: what the allocation has measured of each layer, where it is a `MeasuringAllocation`.
        """
        floors, caps = self._bounds([pruned.get(layer.name, 0) for layer in self.layers], self.target)
        counts = self._allocate(self._num_pruned(self.target, floors, caps), floors, caps, measured)
        return {layer.name: count for layer, count in zip(self.layers, counts, strict=True)}

    def pruned_units(self, layer: PrunableLayer, weight: torch.Tensor) -> int:
        """Returns the number of units of a layer whose weights are all zero."""
        return sum(int(self.pattern.pruned_units(matrix != 0).sum()) for matrix in layer.matrices(weight.detach()))

    def prune_layer(self, scores: LayerScores, count: int) -> None:
        """Prunes the lowest units of one layer: `count` in all, with scope row equally many of each row. N:M prunes as
        many as the pattern requires, whatever the count."""
        prunable = self._prunable_by_row([scores])[0]
        count = int(prunable.sum()) if self.pattern.max_sparsity < 1 else count
        if self.scope == "row":
            shares = [count / scores.num_rows] * scores.num_rows
            by_row = largest_remainder(count, shares, scores.num_pruned_by_row(), prunable)
            scores.prune_rows(torch.from_numpy(by_row))
        else:
            thresholds = find_thresholds([scores], count, [count], [count], self.communicator)
            self._apply_thresholds([scores], thresholds)

    # Which units

    def _apply_thresholds(self, scores: list[LayerScores], thresholds: list[Threshold]) -> None:
        apply_thresholds(scores, split_ties(scores, thresholds, self.communicator))

    def _prune_rows(self, scores: list[LayerScores], total: int, floors: list[int], caps: list[int]) -> None:
        """Scope row: within a layer every row of units loses equally many, up to whole units."""
        counts, prunable = self._allocate(total, floors, caps), self._prunable_by_row(scores)
        pruned, error = self._sum_over_ranks([layer.num_locked_by_row() for layer in scores]), None
        for layer, count, before, most in zip(scores, counts, pruned, prunable, strict=True):
            by_row = largest_remainder(count, [count / layer.num_rows] * layer.num_rows, before, most)
            try:
                layer.prune_rows(torch.from_numpy(by_row))
            except ValueError as problem:  # Continue: other ranks wait for this rank's part of the next layers.
                error = error or problem
        self.communicator.raise_together(error)

    def _sum_over_ranks(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the sum over all ranks of each array, with one collective."""
        ends = np.cumsum([len(array) for array in arrays])[:-1]
        return np.split(self.communicator.sum_counts(np.concatenate(arrays)), ends)

    # Exchange

    def _exchange(
        self,
        fraction: float,
        growth: Criterion | None,
        ratio: float,
        scores: list[LayerScores],
        gradients: Mapping[str, torch.Tensor | None],
    ) -> None:
        """Exchanges a fraction of the kept units for pruned ones, at the sparsity `ratio`."""
        if not fraction or growth is None:
            return
        reads_gradients = bool(growth.requires & Requires.GRADIENTS)
        if reads_gradients and not self._all_finite(gradients):
            logger.warning('group "%s" exchanges nothing at this prune step: no finite gradients.', self.name)
            return
        known = gradients if reads_gradients else {}
        # Bounds of the options alone, because zeros can go from one layer to another.
        bounds = self._global_bounds(*self._bounds([0] * len(scores), ratio))
        exchange_units(fraction, scores, growth, known, self.scope, self.communicator, bounds)

    def _all_finite(self, gradients: Mapping[str, torch.Tensor | None]) -> bool:
        """Whether each layer has a gradient, and all are finite, on all ranks."""
        found = [gradients.get(layer.name) for layer in self.layers]
        usable = [gradient for gradient in found if gradient is not None]
        return not self.communicator.any(len(usable) < len(found) or not all_finite(usable))

    def _given_scores(self, layer: PrunableLayer, shard: Shard, masks: MaskStore, scores: torch.Tensor) -> LayerScores:
        rest = masks.bits(layer.name), scores, self.scope == "row", self.communicator
        return LayerScores(layer, _GivenScores(), self.pattern, shard, *rest, prune_only=False)
