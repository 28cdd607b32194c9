"""The k lowest of any number of scores, exactly, ties by position, with neither a concatenation nor a sort.

    falls(u)  <=>  rank(u) < k        rank: place of unit u in a stable ascending sort of all scores

A score says what is kept: higher is kept. A unit is what falls together (a weight, a block, a head).

Shapes: R rows, U units of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..distributed import SINGLE_PROCESS, Communicator
from ..numerics import as_fastest_array, chunk_size, prefers_numpy
from .scores import Scores, count_threads, each
from .threshold import SelectionProblem, search


@dataclass(frozen=True)
class Threshold:
    """Where a layer is cut: every unit below `value` falls, and the first `ties` by position of those equal to it.

    `Threshold(-inf, 0)` lets nothing fall and `Threshold(inf, numel)` everything.
    """

    value: float
    ties: int
    entire: bool = field(default=False, compare=False, repr=False)
    """Whether it is known that no others equal `value`: then it cuts every part of the layer alike."""


def lowest(scores: Scores, k: int) -> Threshold:
    """Cuts one layer so that exactly its k lowest units fall.

    Raises: ValueError if k is not in 0..numel or a score is NaN.

    >>> from hf_sparse.selection.scores import TensorScores
    >>> lowest(TensorScores(torch.tensor([3.0, 1.0, 2.0, 1.0])), 1)
    Threshold(value=1.0, ties=1)
    """
    return find_thresholds([scores], k)[0]


def find_thresholds(
    layers: Sequence[Scores],
    k: int,
    floors: Sequence[int] | None = None,
    caps: Sequence[int] | None = None,
    communicator: Communicator = SINGLE_PROCESS,
) -> list[Threshold]:
    """Cuts layers so that exactly the k lowest units of all fall, at least floors[l] and at most caps[l] of layer l.

        v = min{v: sum_l clamp(#{score <= v}, floors[l], caps[l]) >= k}

    The units equal to v fall in layer order, then by position, until k have fallen. A layer that its floor or cap
    holds back is cut at a value of its own. Scores are read once, those of held back layers twice, and none where
    nothing is to be decided (k = 0 or all).

    Args:
        layers: L layers.
        k: how many units fall.
        floors, caps: (L) least and most units to fall of each layer; 0 and numel if None.
        communicator: which hold the units between them. Each calls this at the same time, and all get the same cuts.

    Returns: one cut for each layer.

    Raises: ValueError if no such cuts exist or a score is NaN.

    >>> from hf_sparse.selection.scores import TensorScores
    >>> layers = [TensorScores(torch.tensor([1.0, 2.0, 3.0])), TensorScores(torch.tensor([10.0, 20.0]))]
    >>> find_thresholds(layers, 2)
    [Threshold(value=2.0, ties=1), Threshold(value=-inf, ties=0)]
    >>> find_thresholds(layers, 2, floors=[0, 1])
    [Threshold(value=1.0, ties=1), Threshold(value=10.0, ties=1)]
    """
    problem = _problem(layers, k, floors, caps)
    return _cuts(layers, problem, range(len(layers)), communicator)


def keep(chunk: torch.Tensor, cut: Threshold, ties_left: int) -> tuple[torch.Tensor, int]:
    """The units of a chunk that stay, for masks written chunk by chunk.

    Args:
        chunk: (U) scores, as they were ranked.
        cut: of the chunk's layer.
        ties_left: `cut.ties` for the layer's first chunk, what the chunk before returned for the others.

    Returns: (U) bool, True is kept; and how many ties are still to fall.

    >>> keep(torch.tensor([0.0, 1.0, 1.0, 2.0]), Threshold(1.0, 1), 1)
    (tensor([False, False,  True,  True]), 0)
    """
    scores = as_fastest_array(chunk)
    kept = scores >= cut.value
    if ties_left:
        places = (scores == cut.value).nonzero()
        places = places[0] if isinstance(places, tuple) else places[:, 0]
        kept[places[:ties_left]] = False
        ties_left -= min(ties_left, len(places))
    return torch.as_tensor(kept), ties_left


def keep_mask_by_row(scores_RU: torch.Tensor, k_R: torch.Tensor | int) -> torch.Tensor:
    """Lets exactly the k lowest units of each row fall, ties by position.

    Args:
        scores_RU: (R, U) scores.
        k_R: how many fall, of every row or of each.

    Returns: (R, U) bool, True is kept.

    Raises: ValueError if a k is not in 0..U or a score is NaN.

    >>> keep_mask_by_row(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]), 1)
    tensor([[ True, False,  True],
            [False,  True,  True]])
    """
    rows, units = scores_RU.shape
    k_R = torch.as_tensor(k_R, device=scores_RU.device).expand(rows)
    if rows and not (0 <= int(k_R.min()) and int(k_R.max()) <= units):
        raise ValueError(f"k must be in 0..{units}, the units of a row, but is {int(k_R.min())}..{int(k_R.max())}")
    keep_RU = torch.empty(rows, units, dtype=torch.bool, device=scores_RU.device)
    step = max(1, chunk_size(scores_RU.device) // max(1, units))
    for start in range(0, rows if units else 0, step):
        scores, k = scores_RU[start : start + step].detach().float(), k_R[start : start + step]
        if torch.isnan(scores.amax()):
            raise ValueError("scores must not be NaN, but a row has some: look at the data or loss they came from")
        value = _row_values(scores, k)[:, None]
        kept = torch.gt(scores, value, out=keep_RU[start : start + step])
        missing = units - k - kept.sum(1)  # of those equal to the value, which are the last ones by position
        late = missing.nonzero()[:, 0]  # mostly none
        if len(late):
            equal = scores[late] == value[late]
            ties = equal.sum(1) - missing[late]
            kept[late] |= equal & (equal.cumsum(1) > ties[:, None])
    return keep_RU


def _row_values(scores: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(R) the k-th lowest of each row; the lowest where k is 0."""
    index = (k - 1).clamp(min=0)
    distinct = index.unique()
    if len(distinct) > 8 and scores.device.type != "cpu":
        return scores.sort(1)[0].gather(1, index[:, None])[:, 0]
    value = scores.new_empty(len(scores))
    for place in distinct.tolist():
        rows = (index == place).nonzero()[:, 0]
        part = scores[rows]
        if prefers_numpy(part.device):
            part.numpy().partition(place, axis=1)
            value[rows] = part[:, place]
        else:
            value[rows] = part.kthvalue(place + 1, 1)[0]
    return value


def _problem(
    layers: Sequence[Scores], k: int, floors: Sequence[int] | None, caps: Sequence[int] | None
) -> SelectionProblem:
    sizes = np.array([layer.numel for layer in layers], dtype=np.int64)
    floors = np.zeros_like(sizes) if floors is None else np.array(floors, dtype=np.int64)
    caps = sizes if caps is None else np.array(caps, dtype=np.int64)
    if len(floors) != len(sizes) or len(caps) != len(sizes):
        raise ValueError(f"{len(sizes)} layers need as many floors and caps, but got {len(floors)} and {len(caps)}")
    for wrong in np.flatnonzero((floors < 0) | (floors > caps) | (caps > sizes))[:1]:
        raise ValueError(
            f"layer {wrong} needs 0 <= floor <= cap <= {sizes[wrong]}, the number of its units, but its floor is "
            f"{floors[wrong]} and its cap {caps[wrong]}"
        )
    if not floors.sum() <= k <= caps.sum():
        raise ValueError(
            f"k is {k}, but the layers can lose {floors.sum()} to {caps.sum()} of their {sizes.sum()} units: "
            "change k, lower the floors or raise the caps"
        )
    return SelectionProblem(int(k), sizes, floors, caps)


def _cuts(
    layers: Sequence[Scores], problem: SelectionProblem, names: Sequence[int], communicator: Communicator
) -> list[Threshold]:
    if problem.k == problem.floors.sum():
        value, falls = math.nan, problem.floors
    elif problem.k == problem.caps.sum():
        value, falls = math.nan, problem.caps
    else:
        value, below, equal = search(layers, [problem], names, communicator)[0]
        falls = _share_ties(problem, below, equal)

    cuts, held = {}, []
    for index, (fall, size) in enumerate(zip(falls.tolist(), problem.sizes.tolist(), strict=True)):
        if fall in (0, size):
            cuts[index] = Threshold(math.inf, size, True) if fall else Threshold(-math.inf, 0, True)
        elif not math.isnan(value) and below[index] <= fall <= below[index] + equal[index]:
            cuts[index] = _cut(value, fall, int(below[index]), int(equal[index]))
        else:
            held.append(index)  # back by its floor or cap
    # Threads take one layer after the other; processes, which wait for each other at every word, all layers at once.
    batches = [[index] for index in held] if communicator.world_size == 1 else [held] * bool(held)

    def cut(batch: list[int]) -> list[Threshold]:
        own = [layers[index] for index in batch]
        problems = [_problem([layers[index]], falls[index], None, None) for index in batch]
        found = search(own, problems, [names[index] for index in batch], communicator)
        return [
            _cut(value, problem.k, int(below.sum()), int(equal.sum()))
            for problem, (value, below, equal) in zip(problems, found, strict=True)
        ]

    found = each(cut, batches, count_threads(layers, communicator))
    cuts |= zip(held, (cut for batch in found for cut in batch), strict=True)
    return [cuts[index] for index in range(len(layers))]


def _cut(value: float, fall: int, below: int, equal: int) -> Threshold:
    return Threshold(value, fall - below, fall == below + equal)


def _share_ties(problem: SelectionProblem, below: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """(L) how many units of each layer fall, when those equal to the common value do so in layer order."""
    least, most = problem.fallen(below), problem.fallen(below + equal)
    left = problem.k - least.sum()
    taken_before = np.cumsum(most - least) - (most - least)
    return least + np.clip(left - taken_before, 0, most - least)
