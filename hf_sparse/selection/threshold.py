"""Thresholds: the k lowest scores of any number of layers, exactly, without sorting or storing the scores.

    unit u is pruned  <=>  rank(u) < k        rank: index of u in a stable ascending sort of all layers' scores

The common threshold of L layers, of which at least floors[l] and at most caps[l] units may be pruned, is

    v = min{v: sum_l clamp(#{scores <= v of layer l}, floors[l], caps[l]) >= k}

A sample of the scores gives a bracket of v. One pass over all scores counts those below the bracket and collects the
few inside it, among which v is selected. Where the counts show that v is outside the bracket, histograms give
another one. Counts, collected scores and histograms of chunks, threads and ranks are merged exactly, so that their
number does not change the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat, starmap
from typing import Any, NamedTuple

import numpy as np
import torch

from ..distributed import SINGLE_PROCESS, Communicator
from ..kernels import has_kernels
from ..numerics import as_fastest_array, gather_counts
from .bracket import ALL_SCORES, Bracket, bracket_from_histograms, bracket_from_sample, sample_sizes
from .histogram_search import search_by_histograms
from .packed_scores import Array, PackedScores, gather_scores
from .problem import SelectionProblem
from .scores import Scores


_MIN_THREADED = 4_000_000  # number of units from which threads are worth their start


@dataclass(frozen=True)
class Threshold:
    """The limit between the pruned and the kept units of a layer.

    Units with a score below `value` are pruned, and of those equal to `value` the first `num_ties` by position.
    `Threshold(-inf, 0)` prunes nothing and `Threshold(inf, numel)` everything.

    Args:
        value: the score.
        num_ties: number of units to prune among those equal to `value`.
        includes_all_ties: whether these are known to be all units equal to `value`, so that their positions do not
            matter.
    """

    value: float
    num_ties: int
    includes_all_ties: bool = field(default=False, compare=False, repr=False)

    def keep_mask(self, scores: torch.Tensor, ties_left: int) -> tuple[torch.Tensor, int]:
        """Returns the mask of a chunk of the layer's scores. Chunks are passed in the order of their position.

        Args:
            scores: (U) the chunk.
            ties_left: `num_ties` for the first chunk, then what the call for the previous chunk returned.

        Returns:
            (U) bool, True is kept; and the number of ties left to prune.

        Example:
            >>> Threshold(1.0, 1).keep_mask(torch.tensor([0.0, 1.0, 1.0, 2.0]), ties_left=1)
            (tensor([False, False,  True,  True]), 0)
        """
        values: Any = as_fastest_array(scores)
        if self.num_ties and self.includes_all_ties:
            return torch.as_tensor(values > self.value), ties_left
        kept = values >= self.value
        if ties_left:
            ties = (values == self.value).nonzero()
            ties = ties[0] if isinstance(ties, tuple) else ties[:, 0]
            kept[ties[:ties_left]] = False
            ties_left -= min(ties_left, len(ties))
        return torch.as_tensor(kept), ties_left


def find_threshold(scores: Scores, k: int) -> Threshold:
    """Returns the threshold that prunes exactly the k lowest units of one layer.

    Raises:
        ValueError: k is not from 0 to numel, or a score is NaN.

    Example:
        >>> from hf_sparse.selection.scores import TensorScores
        >>> find_threshold(TensorScores(torch.tensor([3.0, 1.0, 2.0, 1.0])), 1)
        Threshold(value=1.0, num_ties=1)
    """
    return find_thresholds([scores], k)[0]


def find_thresholds(
    layers: Sequence[Scores],
    k: int,
    floors: Sequence[int] | None = None,
    caps: Sequence[int] | None = None,
    communicator: Communicator = SINGLE_PROCESS,
) -> list[Threshold]:
    """Returns thresholds that prune exactly the k lowest units of all layers within the bounds of each layer.

    Units equal to the common threshold are pruned in the order of layers, then of positions. A layer whose floor or
    cap binds has a threshold of its own. Scores are read about once, those of layers whose bounds bind about twice;
    they are not read where no unit has to be chosen (k = 0 or all units).

    Args:
        layers: (L) the scores of each layer.
        k: number of units to prune.
        floors: (L) smallest number of units to prune of each layer; None for 0.
        caps: (L) largest number of units to prune of each layer; None for all.
        communicator: of the ranks that hold the units, which call this function together and get the same result.

    Returns:
        (L) thresholds.

    Raises:
        ValueError: no such thresholds exist, or a score is NaN.

    Example:
        >>> from hf_sparse.selection.scores import TensorScores
        >>> layers = [TensorScores(torch.tensor([1.0, 2.0, 3.0])), TensorScores(torch.tensor([10.0, 20.0]))]
        >>> find_thresholds(layers, 2)
        [Threshold(value=2.0, num_ties=1), Threshold(value=-inf, num_ties=0)]
        >>> find_thresholds(layers, 2, floors=[0, 1])
        [Threshold(value=1.0, num_ties=1), Threshold(value=10.0, num_ties=1)]
    """
    problem, common = SelectionProblem.create(layers, k, floors, caps), None
    if problem.k == problem.floors.sum():
        num_pruned = problem.floors
    elif problem.k == problem.caps.sum():
        num_pruned = problem.caps
    else:
        (common,) = search([problem], communicator)
        num_pruned = common.num_pruned(problem)

    thresholds: dict[int, Threshold] = {}
    bound = []  # one problem for each layer whose floor or cap binds
    for index, (layer, count) in enumerate(zip(layers, num_pruned.tolist(), strict=True)):
        if count in (0, layer.numel):
            thresholds[index] = Threshold(math.inf if count else -math.inf, count, includes_all_ties=True)
        elif common is not None and common.num_below[index] <= count <= common.num_up_to[index]:
            thresholds[index] = common.threshold(index, count)
        else:
            bound.append(SelectionProblem.create([layer], count, layer_indices=[index]))
    # Threads solve one problem each. Ranks and kernels solve all problems together, to communicate once for all.
    is_together = communicator.world_size > 1 or _use_kernels(layers, communicator)
    batches = ([bound] if bound else []) if is_together else [[single] for single in bound]
    with _thread_map(layers, communicator) as thread_map:
        solved = chain.from_iterable(thread_map(partial(search, communicator=communicator), batches))
        for single, result in zip(bound, solved, strict=True):
            thresholds[single.layer_indices[0]] = result.threshold(0, single.k)
    return [thresholds[index] for index in range(len(layers))]


@dataclass(frozen=True)
class CommonThreshold:
    """The solution of a selection problem.

    Args:
        value: the common threshold v.
        num_below: (L) number of units of each layer with a score below v, over all ranks.
        num_up_to: (L) number of units with a score up to v.
    """

    value: float
    num_below: np.ndarray
    num_up_to: np.ndarray

    def num_pruned(self, problem: SelectionProblem) -> np.ndarray:
        """Returns the number of units to prune of each layer (L), ties in the order of layers."""
        least, most = problem.num_pruned(self.num_below), problem.num_pruned(self.num_up_to)
        num_ties = problem.k - least.sum()
        ties_before = np.cumsum(most - least) - (most - least)
        return least + np.clip(num_ties - ties_before, 0, most - least)

    def threshold(self, index: int, count: int) -> Threshold:
        """Returns the threshold that prunes `count` units of a layer."""
        num_ties = count - int(self.num_below[index])
        return Threshold(self.value, num_ties, includes_all_ties=bool(count == self.num_up_to[index]))


def search(problems: Sequence[SelectionProblem], communicator: Communicator) -> list[CommonThreshold]:
    """Finds the common threshold of each problem, where sum(floors) < k < sum(caps).

    Problems are solved side by side, so that ranks communicate once for all of them.

    Raises:
        ValueError: a score is NaN.
    """
    layers = [layer for problem in problems for layer in problem.layers]
    if _use_kernels(layers, communicator):
        return [CommonThreshold(*found) for found in search_by_histograms(problems)]
    indices = [index for problem in problems for index in problem.layer_indices]
    num_layers = [len(problem.layers) for problem in problems]
    min_capacity = 2**18 if len(problems) == 1 else 2**16
    capacities = [
        _Capacity(min_capacity + int(problem.sizes.sum()) // (64 * communicator.world_size)) for problem in problems
    ]
    with _thread_map(layers, communicator) as thread_map:
        sizes = np.concatenate([sample_sizes(problem) for problem in problems]).tolist()
        brackets = [ALL_SCORES] * len(problems)
        if any(sizes):
            samples = gather_scores(list(thread_map(_sample_layer, layers, sizes)), indices, communicator)
            parts = samples.split(num_layers)
            brackets = [bracket_from_sample(*both) for both in zip(problems, parts, strict=True)]
        problem_of = np.repeat(np.arange(len(problems)), num_layers).tolist()
        limits = [brackets[index] for index in problem_of], [capacities[index] for index in problem_of]
        counts = list(thread_map(_count_layer, layers, *limits))
        solutions, first_solutions = [], _solve(problems, brackets, capacities, counts, communicator)
        for problem, solution in zip(problems, first_solutions, strict=True):
            while solution is None:  # the sample was misleading
                bracket, unlimited = bracket_from_histograms(problem, communicator), _Capacity(math.inf)
                counts = list(thread_map(_count_layer, problem.layers, repeat(bracket), repeat(unlimited)))
                (solution,) = _solve([problem], [bracket], [unlimited], counts, communicator)
            solutions.append(solution)
    return solutions


def _use_kernels(layers: Sequence[Scores], communicator: Communicator) -> bool:
    """Whether the scores are on one device, and this is the only process that has any."""
    devices = {layer.device for layer in layers}
    return communicator.world_size == 1 and len(devices) == 1 and has_kernels(*devices)


@contextmanager
def _thread_map(layers: Sequence[Scores], communicator: Communicator) -> Iterator[Callable[..., Iterator[Any]]]:
    """Provides `map`, or a `map` over threads for many units on the CPU.

    Accelerators need the caller's thread, which has their stream; ranks need one order of communication.
    """
    is_small = sum(layer.local_numel for layer in layers) < _MIN_THREADED or len(layers) == 1
    if is_small or communicator.world_size > 1 or layers[0].device.type != "cpu" or torch.get_num_threads() == 1:
        yield map
    else:
        threads = min(len(layers), torch.get_num_threads())
        with ThreadPoolExecutor(threads) as pool:

            def thread_map(function: Callable[..., Any], *iterables: Iterable[Any]) -> Iterator[Any]:
                arguments = list(zip(*iterables))
                size = len(arguments) // (32 * threads) + 1  # a few layers at a time, where there are many
                batches = [arguments[start : start + size] for start in range(0, len(arguments), size)]
                return chain.from_iterable(pool.map(lambda batch: list(starmap(function, batch)), batches))

            yield thread_map


def _sample_layer(layer: Scores, size: int) -> list[Array]:
    return [as_fastest_array(layer.sample(math.ceil(size * layer.local_numel / layer.numel)))] if size else []


@dataclass
class _Capacity:
    """The number of scores that may still be collected for a problem on this rank. Its layers share it, over threads
    without a lock, since the limit need not be exact."""

    left: float


class _LayerCounts(NamedTuple):
    """Numbers of local scores below the bracket and, if it counts them, at its ends, for `gather_counts`; and the
    scores inside it."""

    below: int | torch.Tensor
    at_low: int | torch.Tensor
    at_high: int | torch.Tensor
    inside: list[Array]


def _count_layer(layer: Scores, bracket: Bracket, capacity: _Capacity) -> _LayerCounts:
    """Counts the scores of a layer in one pass, which ends early once the capacity is used up."""
    num_below: Any = 0
    num_at_low: Any = 0
    num_at_high: Any = 0
    inside = []
    for chunk in layer.chunks():
        scores: Any = as_fastest_array(chunk)
        # On an accelerator counts are tensors, which are read once for all layers.
        count: Any = np.count_nonzero if isinstance(scores, np.ndarray) else torch.count_nonzero
        is_below = scores < bracket.low
        is_inside = is_below == (scores > bracket.high)  # where neither holds, as for NaN
        num_below += count(is_below)
        if bracket.counts_ends:
            is_low, is_high = scores == bracket.low, scores == bracket.high
            num_at_low += count(is_low)
            num_at_high += count(is_high) if bracket.high > bracket.low else 0
            is_inside &= ~(is_low | is_high)
        collected = scores[is_inside]
        if len(collected):
            inside.append(collected)
            capacity.left -= len(collected)
        if capacity.left < 0:
            break
    return _LayerCounts(num_below, num_at_low, num_at_high, inside)


def _solve(
    problems: Sequence[SelectionProblem],
    brackets: Sequence[Bracket],
    capacities: Sequence[_Capacity],
    counts: Sequence[_LayerCounts],
    communicator: Communicator,
) -> list[CommonThreshold | None]:
    """Merges the counts of all ranks; None for a problem whose bracket missed v or held too many scores."""
    num_layers = [len(problem.layers) for problem in problems]
    indices = [index for problem in problems for index in problem.layer_indices]
    is_full = np.repeat([capacity.left < 0 for capacity in capacities], num_layers)
    *local_counts, local_inside = zip(*counts, strict=True)
    flat_counts = gather_counts([*chain.from_iterable(local_counts), *is_full])
    *sums, num_full = communicator.sum_counts(flat_counts.reshape(4, -1))
    collected = [[] if full else parts for parts, full in zip(local_inside, num_full, strict=True)]
    inside = gather_scores(collected, indices, communicator).split(num_layers)
    ends = np.cumsum(num_layers)[:-1]
    split = [np.split(numbers, ends) for numbers in (num_full, *sums)]
    return [
        None if full.any() else _select(problem, bracket, below, at_low, at_high, scores)
        for problem, bracket, scores, full, below, at_low, at_high in zip(problems, brackets, inside, *split)
    ]


def _select(
    problem: SelectionProblem,
    bracket: Bracket,
    num_below: np.ndarray,
    num_at_low: np.ndarray,
    num_at_high: np.ndarray,
    inside: PackedScores,
) -> CommonThreshold | None:
    """Selects v inside a bracket, given the counts of all ranks (L); None if v is outside."""
    base = num_below + num_at_low
    most = base + inside.lengths
    if problem.total_pruned(num_below) >= problem.k or problem.total_pruned(most + num_at_high) < problem.k:
        return None
    if problem.total_pruned(base) >= problem.k:
        value = bracket.low
    elif problem.total_pruned(most) < problem.k:
        value = bracket.high
    elif problem.is_bounded:
        value = inside.lowest_value_reaching(problem.k, lambda counts: problem.total_pruned(base + counts))
    else:
        (value,) = inside.values_at_ranks([problem.k - int(base.sum())])
    below = (num_below if value == bracket.low else base) + inside.count_where(lambda values: values < value)
    equal = np.where(value == bracket.low, num_at_low, 0) + inside.count_where(lambda values: values == value)
    equal = equal + np.where(value == bracket.high, num_at_high, 0)
    return CommonThreshold(value + 0.0, below, below + equal)
