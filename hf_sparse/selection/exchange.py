"""The exchange of units: the lowest kept ones are pruned, and as many pruned ones return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..criteria import Criterion
from ..distributed import Communicator
from ..numerics import gather_counts
from .apply import apply_thresholds
from .layer_scores import LayerScores
from .threshold import find_thresholds
from .ties import split_ties


Counts = Sequence[int] | None


def exchange_units(
    fraction: float,
    scores: Sequence[LayerScores],
    growth: Criterion,
    statistics: Mapping[str, torch.Tensor | None],
    scope: str,
    communicator: Communicator,
    bounds: tuple[Counts, Counts] = (None, None),
) -> None:
    """Prunes a fraction of the kept units, and lets as many pruned units return, on all ranks at once. Those that were
    pruned just now can return too.

    A pattern that protects units, such as N:M, protects none of them from being pruned here; then the units return
    that it needs, and no others where it needs as many as were pruned.

    Args:
        fraction: of the kept units: of each row, of each layer, or of all layers, as the scope says.
        scores: (L) the layers; the lowest are pruned, after those that are pruned already, which score -inf.
        growth: scores the units that may return, the highest of which do.
        statistics: what `growth` requires, by the name of the layer, of the shape of its shard's tensor.
        scope: "row", "layer" or "global".
        communicator: of the ranks that hold the weights.
        bounds: with scope global, the (L) fewest and the (L) most pruned units of each layer.
    """
    dropping, growing = [_dropping(layer, scope, communicator) for layer in scores], []
    for layer in scores:
        rest = layer.mask_bits, statistics.get(layer.layer.name), scope == "row", communicator
        growing.append(LayerScores(layer.layer, growth, layer.pattern, layer.shard, *rest, False, grow_only=True))
    if scope == "row":
        _exchange_within_rows(fraction, dropping, growing, communicator)
        return
    pruned = communicator.sum_counts(gather_counts([layer.num_pruned() for layer in scores])).tolist()
    kept = [layer.numel - count for layer, count in zip(scores, pruned, strict=True)]
    if scope == "global":
        _prune_lowest(dropping, sum(pruned) + round(fraction * sum(kept)), (None, None), communicator)
        _prune_lowest(growing, sum(pruned), bounds, communicator)
    else:
        by_layer = [count + round(fraction * left) for count, left in zip(pruned, kept, strict=True)]
        _prune_lowest(dropping, sum(by_layer), (by_layer, by_layer), communicator)
        _prune_lowest(growing, sum(pruned), (pruned, pruned), communicator)


def _dropping(layer: LayerScores, scope: str, communicator: Communicator) -> LayerScores:
    """Returns the scores of the units of a layer, of which the pattern protects none."""
    pattern = layer.pattern.unprotected
    if pattern is layer.pattern:
        return layer
    rest = layer.mask_bits, layer.statistic, scope == "row", communicator
    return LayerScores(layer.layer, layer.criterion, pattern, layer.shard, *rest)


def _prune_lowest(
    layers: Sequence[LayerScores], count: int, bounds: tuple[Counts, Counts], communicator: Communicator
) -> None:
    thresholds = find_thresholds(layers, count, *bounds, communicator)
    apply_thresholds(layers, split_ties(layers, thresholds, communicator))


def _exchange_within_rows(
    fraction: float, dropping: Sequence[LayerScores], growing: Sequence[LayerScores], communicator: Communicator
) -> None:
    """Exchanges units of which each row keeps as many."""
    error = None
    ends = np.cumsum([layer.num_rows for layer in growing])[:-1]
    pruned = np.split(communicator.sum_counts(np.concatenate([layer.num_pruned_by_row() for layer in growing])), ends)
    for drop, grow, counts in zip(dropping, growing, pruned, strict=True):
        kept = grow.numel // grow.num_rows - counts
        try:
            drop.prune_rows(torch.from_numpy(counts + np.round(fraction * kept).astype(np.int64)))
            grow.prune_rows(torch.from_numpy(counts))
        except ValueError as problem:  # Continue: other ranks wait for this rank's part of the next layers.
            error = error or problem
    communicator.raise_together(error)
