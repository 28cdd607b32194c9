"""The k lowest of any number of scores, exactly, ties by position, with neither a concatenation nor a sort.

    falls(u)  <=>  rank(u) < k        rank: place of unit u in a stable ascending sort of all scores

A score says what is kept: higher is kept. A unit is what falls together (a weight, a block, a head).

Shapes: R rows, U units of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .scores import Scores, array, count_threads, each
from .sharding import ALONE, OneProcess
from .threshold import Problem, search


__all__ = ["Cut", "Scores", "TensorScores", "keep", "lowest", "lowest_per_row", "lowest_together", "places", "spread"]

# A chunk and its masks stay in a core's cache. It holds whole groups of every size up to 10, of 12 to 16 and of 32.
CHUNK = 262_080
CHUNK_ON_ACCELERATOR = 64 * CHUNK  # there, launching a kernel costs more than memory

_RUN = 16  # neighbours sampled together: they share a cache line


@dataclass(frozen=True)
class Cut:
    """Where a layer is cut: every unit below `value` falls, and the first `ties` by position of those equal to it.

    `Cut(-inf, 0)` lets nothing fall and `Cut(inf, numel)` everything.
    """

    value: float
    ties: int
    entire: bool = field(default=False, compare=False, repr=False)
    """Whether it is known that no others equal `value`: then it cuts every part of the layer alike."""


class TensorScores:
    """The entries of a tensor as scores, or their magnitudes.

    Args:
        tensor: any shape, any floating dtype; upcast to float32 chunk by chunk.
        magnitude: score |w| instead of w.

    >>> [chunk.tolist() for chunk in TensorScores(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]), magnitude=True).chunks()]
    [[1.0, 2.0, 3.0, 4.0]]
    """

    def __init__(self, tensor: torch.Tensor, magnitude: bool = False):
        self.tensor = tensor.detach()
        self.magnitude = magnitude
        self.numel = self.held = tensor.numel()
        self.device = tensor.device

    def chunks(self) -> Iterator[torch.Tensor]:
        flat = self.tensor.reshape(-1)
        size = CHUNK if flat.device.type == "cpu" else CHUNK_ON_ACCELERATOR
        buffer = torch.empty(min(size, self.numel), dtype=torch.float32, device=flat.device)
        on_cpu = flat.device.type == "cpu" and flat.dtype == torch.float32
        source, target = (flat.numpy(), buffer.numpy()) if on_cpu else (flat, buffer)
        for start in range(0, self.numel, size):
            part = source[start : start + size]
            scores = target[: len(part)]
            if on_cpu:  # numpy stays in its thread, where torch would start others
                np.abs(part, out=scores) if self.magnitude else np.copyto(scores, part)
            elif scores.copy_(part) is not None and self.magnitude:
                scores.abs_()
            yield torch.as_tensor(scores)

    def sample(self, count: int) -> torch.Tensor:
        scores = spread(self.tensor.reshape(-1), count).to(torch.float32, copy=True).view(-1)
        return scores.abs_() if self.magnitude else scores


def places(numel: int, count: int) -> tuple[int, int, int]:
    """Where to look for about `count` of `numel` entries: (rows, stride, run), entry r * stride + i for each i < run.

    Short runs at an odd stride, which no even row length repeats; (1, numel, numel) where `count` is not much less.

    >>> places(10_000, 48)
    (3, 3327, 16)
    """
    rows = max(1, round(count / _RUN))
    stride = (numel - _RUN) // rows
    stride -= 1 - stride % 2
    return (rows, stride, _RUN) if stride >= 2 * _RUN else (1, numel, numel)


def spread(flat: torch.Tensor, count: int) -> torch.Tensor:
    """A view (rows, run) of about `count` entries of a 1-D tensor, at its `places`."""
    rows, stride, run = places(len(flat), count)
    step = flat.stride(0)
    return flat.as_strided((rows, run), (stride * step, step), flat.storage_offset())


def lowest(scores: Scores, k: int) -> Cut:
    """Cuts one layer so that exactly its k lowest units fall.

    Raises: ValueError if k is not in 0..numel or a score is NaN.

    >>> lowest(TensorScores(torch.tensor([3.0, 1.0, 2.0, 1.0])), 1)
    Cut(value=1.0, ties=1)
    """
    return lowest_together([scores], k)[0]


def lowest_together(
    layers: Sequence[Scores],
    k: int,
    floors: Sequence[int] | None = None,
    caps: Sequence[int] | None = None,
    processes: OneProcess = ALONE,
) -> list[Cut]:
    """Cuts layers so that exactly the k lowest units of all fall, at least floors[l] and at most caps[l] of layer l.

        v = min{v: sum_l clamp(#{score <= v}, floors[l], caps[l]) >= k}

    The units equal to v fall in layer order, then by position, until k have fallen. A layer that its floor or cap
    holds back is cut at a value of its own. Scores are read once, those of held back layers twice, and none where
    nothing is to be decided (k = 0 or all).

    Args:
        layers: L layers.
        k: how many units fall.
        floors, caps: (L) least and most units to fall of each layer; 0 and numel if None.
        processes: which hold the units between them. Each calls this at the same time, and all get the same cuts.

    Returns: one cut for each layer.

    Raises: ValueError if no such cuts exist or a score is NaN.

    >>> layers = [TensorScores(torch.tensor([1.0, 2.0, 3.0])), TensorScores(torch.tensor([10.0, 20.0]))]
    >>> lowest_together(layers, 2)
    [Cut(value=2.0, ties=1), Cut(value=-inf, ties=0)]
    >>> lowest_together(layers, 2, floors=[0, 1])
    [Cut(value=1.0, ties=1), Cut(value=10.0, ties=1)]
    """
    problem = _problem(layers, k, floors, caps)
    return _cuts(layers, problem, range(len(layers)), processes)


def keep(chunk: torch.Tensor, cut: Cut, ties_left: int) -> tuple[torch.Tensor, int]:
    """The units of a chunk that stay, for masks written chunk by chunk.

    Args:
        chunk: (U) scores, as they were ranked.
        cut: of the chunk's layer.
        ties_left: `cut.ties` for the layer's first chunk, what the chunk before returned for the others.

    Returns: (U) bool, True is kept; and how many ties are still to fall.

    >>> keep(torch.tensor([0.0, 1.0, 1.0, 2.0]), Cut(1.0, 1), 1)
    (tensor([False, False,  True,  True]), 0)
    """
    scores = array(chunk)
    kept = scores >= cut.value
    if ties_left:
        places = (scores == cut.value).nonzero()
        places = places[0] if isinstance(places, tuple) else places[:, 0]
        kept[places[:ties_left]] = False
        ties_left -= min(ties_left, len(places))
    return torch.as_tensor(kept), ties_left


def lowest_per_row(scores_RU: torch.Tensor, k_R: torch.Tensor | int) -> torch.Tensor:
    """Lets exactly the k lowest units of each row fall, ties by position.

    Args:
        scores_RU: (R, U) scores.
        k_R: how many fall, of every row or of each.

    Returns: (R, U) bool, True is kept.

    Raises: ValueError if a k is not in 0..U or a score is NaN.

    >>> lowest_per_row(torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]), 1)
    tensor([[ True, False,  True],
            [False,  True,  True]])
    """
    rows, units = scores_RU.shape
    k_R = torch.as_tensor(k_R, device=scores_RU.device).expand(rows)
    if rows and not (0 <= int(k_R.min()) and int(k_R.max()) <= units):
        raise ValueError(f"k must be in 0..{units}, the units of a row, but is {int(k_R.min())}..{int(k_R.max())}")
    keep_RU = torch.empty(rows, units, dtype=torch.bool, device=scores_RU.device)
    step = max(1, (CHUNK if scores_RU.device.type == "cpu" else CHUNK_ON_ACCELERATOR) // max(1, units))
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
        if isinstance(array(part), np.ndarray):
            part.numpy().partition(place, axis=1)
            value[rows] = part[:, place]
        else:
            value[rows] = part.kthvalue(place + 1, 1)[0]
    return value


def _problem(layers: Sequence[Scores], k: int, floors: Sequence[int] | None, caps: Sequence[int] | None) -> Problem:
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
    return Problem(int(k), sizes, floors, caps)


def _cuts(layers: Sequence[Scores], problem: Problem, names: Sequence[int], processes: OneProcess) -> list[Cut]:
    if problem.k == problem.floors.sum():
        value, falls = math.nan, problem.floors
    elif problem.k == problem.caps.sum():
        value, falls = math.nan, problem.caps
    else:
        value, below, equal = search(layers, [problem], names, processes)[0]
        falls = _share_ties(problem, below, equal)

    cuts, held = {}, []
    for index, (fall, size) in enumerate(zip(falls.tolist(), problem.sizes.tolist(), strict=True)):
        if fall in (0, size):
            cuts[index] = Cut(math.inf, size, True) if fall else Cut(-math.inf, 0, True)
        elif not math.isnan(value) and below[index] <= fall <= below[index] + equal[index]:
            cuts[index] = _cut(value, fall, int(below[index]), int(equal[index]))
        else:
            held.append(index)  # back by its floor or cap
    # Threads take one layer after the other; processes, which wait for each other at every word, all layers at once.
    batches = [[index] for index in held] if processes.size == 1 else [held] * bool(held)

    def cut(batch: list[int]) -> list[Cut]:
        own = [layers[index] for index in batch]
        problems = [_problem([layers[index]], falls[index], None, None) for index in batch]
        found = search(own, problems, [names[index] for index in batch], processes)
        return [
            _cut(value, problem.k, int(below.sum()), int(equal.sum()))
            for problem, (value, below, equal) in zip(problems, found, strict=True)
        ]

    found = each(cut, batches, count_threads(layers, processes))
    cuts |= zip(held, (cut for batch in found for cut in batch), strict=True)
    return [cuts[index] for index in range(len(layers))]


def _cut(value: float, fall: int, below: int, equal: int) -> Cut:
    return Cut(value, fall - below, fall == below + equal)


def _share_ties(problem: Problem, below: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """(L) how many units of each layer fall, when those equal to the common value do so in layer order."""
    least, most = problem.fallen(below), problem.fallen(below + equal)
    left = problem.k - least.sum()
    taken_before = np.cumsum(most - least) - (most - least)
    return least + np.clip(left - taken_before, 0, most - least)
