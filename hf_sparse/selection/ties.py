"""Splits the ties of thresholds over ranks, so that ties are pruned in the order of positions in the whole layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..distributed import Communicator
from .layer_scores import LayerScores
from .threshold import Threshold


def split_ties(
    scores: Sequence[LayerScores], thresholds: Sequence[Threshold], communicator: Communicator
) -> list[Threshold]:
    """Returns the thresholds of this rank's part of each layer: the same values with this rank's number of ties.

    Ranks exchange the position and the number of ties of contiguous runs, not of single units.

    Args:
        scores: (L) the layers.
        thresholds: (L) the thresholds of the whole layers, equal on all ranks.
        communicator: of the ranks that hold the layers, which call this function together.
    """
    local_thresholds = list(thresholds)
    if communicator.world_size == 1:
        return local_thresholds
    split = [
        index
        for index, (layer, threshold) in enumerate(zip(scores, thresholds, strict=True))
        if 0 < threshold.num_ties < layer.numel and not threshold.includes_all_ties
    ]
    if not split:
        return local_thresholds
    runs = []  # (layer index, position, number of ties) of each run
    for index in split:
        positions, counts = scores[index].count_ties(thresholds[index].value)
        runs.append(np.stack([np.full_like(positions, index), positions, counts], axis=1))
    runs_by_rank = communicator.all_gather(torch.from_numpy(np.concatenate(runs).reshape(-1)))
    rank_of_run = np.repeat(np.arange(len(runs_by_rank)), [len(part) // 3 for part in runs_by_rank])
    layer_of_run, positions, counts = torch.cat(runs_by_rank).view(-1, 3).numpy().T
    for index in split:
        order = np.flatnonzero(layer_of_run == index)
        order = order[np.argsort(positions[order])]
        ties_before = np.cumsum(counts[order]) - counts[order]
        num_pruned = np.clip(thresholds[index].num_ties - ties_before, 0, counts[order])
        num_local = num_pruned[rank_of_run[order] == scores[index].reader_rank].sum()
        local_thresholds[index] = Threshold(thresholds[index].value, int(num_local))
    return local_thresholds
