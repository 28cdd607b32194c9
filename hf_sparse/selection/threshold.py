"""The one value that decides over the units of many layers, found in about one read of their scores.

    v = min{v: sum_l clamp(#{u in l: score(u) <= v}, floor_l, cap_l) >= k}

Several problems, each of layers of its own, are solved side by side, so that processes speak once for all of them.

A sample brackets v. One pass counts what lies below the bracket and collects the little that lies inside, and v is
selected among that. If the bracket missed v the counts tell, and histograms narrow v down instead, each in a pass.

Counts, collected scores and histograms of parts merge by adding or joining, over chunks, threads and processes alike;
only `_decide` and `_narrowed` draw conclusions from them.

Shapes: L layers, B buckets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..distributed import Communicator
from ..numerics import as_fastest_array, prefers_numpy
from .scores import LayerSamples, Scores, collect, count_threads, each


_FEW = 4096  # so few scores are collected as they are
_DEVIATIONS = (
    4.0  # half-width of the bracket, in standard deviations of the sample's rank: one search in 16,000 misses
)
_BUCKETS = 256  # of a histogram, for each layer


@dataclass(frozen=True)
class SelectionProblem:
    """k units fall over L layers, floors[l] to caps[l] of each; all (L) int64."""

    k: int
    sizes: np.ndarray
    floors: np.ndarray
    caps: np.ndarray

    @property
    def free(self) -> bool:
        """Whether no layer can be held back."""
        return not self.floors.any() and bool((self.caps == self.sizes).all())

    def fallen(self, counts: np.ndarray) -> np.ndarray:
        """(L) units that fall of each layer if `counts` of them lie below the common value."""
        return np.clip(counts, self.floors, self.caps)

    def total(self, counts: np.ndarray) -> float:
        return self.fallen(counts).sum()


Found = tuple[float, np.ndarray, np.ndarray]
"""v, and for each layer of a problem (L) the number of units below it and equal to it, in all processes."""


@dataclass(frozen=True)
class _Bracket:
    """v is thought to be in low..high; `tied` if many scores equal an end and are better counted than collected."""

    low: float
    high: float
    tied: bool


_EVERYTHING = _Bracket(-math.inf, math.inf, tied=False)


@dataclass(frozen=True)
class _Tally:
    """What a pass found of each layer: counts (L), and the scores inside the bracket that were not counted."""

    bracket: _Bracket
    below: np.ndarray
    at_low: np.ndarray
    at_high: np.ndarray
    inside: LayerSamples


def search(
    layers: Sequence[Scores], problems: Sequence[SelectionProblem], names: Sequence[int], communicator: Communicator
) -> list[Found]:
    """Finds the v of each problem, for sum(floors) < k < sum(caps). The layers of all come one after the other.

    Raises: ValueError, with the layer's entry of `names`, if a score is NaN.
    """
    few = 2**18 if len(problems) == 1 else 2**16
    rooms = [few + int(problem.sizes.sum()) // (64 * communicator.world_size) for problem in problems]
    found = _found(layers, problems, _sampled(layers, problems, names, communicator), names, communicator, rooms)
    ends = np.cumsum([len(problem.sizes) for problem in problems]).tolist()
    for index in [index for index, result in enumerate(found) if result is None]:
        own, problem = slice(ends[index] - len(problems[index].sizes), ends[index]), problems[index]
        bracket = _narrowed(layers[own], problem, communicator)
        (found[index],) = _found(layers[own], [problem], [bracket], names[own], communicator, [math.inf])
    return found


def _found(layers, problems, brackets: Sequence[_Bracket], names, communicator, rooms: Sequence[float]) -> list:
    """What `search` returns; None where the bracket missed v."""
    tallies = _tally(layers, problems, brackets, names, communicator, rooms)
    return [tally and _decide(problem, tally) for problem, tally in zip(problems, tallies, strict=True)]


def _sampled(
    layers: Sequence[Scores], problems: Sequence[SelectionProblem], names: Sequence[int], communicator: Communicator
) -> list[_Bracket]:
    shares = np.concatenate([_shares(problem) for problem in problems])
    if not shares.any():
        return [_EVERYTHING] * len(problems)

    def look(index: int) -> list:
        layer, share = layers[index], int(shares[index])
        return [as_fastest_array(layer.sample(math.ceil(share * layer.held / layer.numel)))] if share else []

    threads = count_threads(layers, communicator)
    samples = collect(each(look, range(len(layers)), threads), names, communicator)
    parts = samples.split([len(problem.sizes) for problem in problems])
    return [_bracket(problem, sample) for problem, sample in zip(problems, parts, strict=True)]


def _shares(problem: SelectionProblem) -> np.ndarray:
    """(L) how many scores of each layer to look at; none of few."""
    total = int(problem.sizes.sum())
    if total <= _FEW:
        return np.zeros_like(problem.sizes)
    # n^(2/3) balances the cost of the sample and of what its bracket lets inside
    return np.diff(np.floor(np.cumsum(problem.sizes) * (2 * total ** (2 / 3) / total)), prepend=0).astype(np.int64)


def _bracket(problem: SelectionProblem, sample: LayerSamples) -> _Bracket:
    if not len(sample.values):
        return _EVERYTHING
    low, high = (_bracket_free if problem.free else _bracket_held)(problem, sample)
    at_ends = sample.count(lambda values: (values == low) | (values == high)).sum()
    return _Bracket(low, high, tied=at_ends > len(sample.values) // 64)


def _bracket_free(problem: SelectionProblem, sample: LayerSamples) -> tuple[float, float]:
    share, count = problem.k / problem.sizes.sum(), len(sample.values)
    half = _DEVIATIONS * math.sqrt(count * share * (1 - share)) + 8
    ranks = math.floor(count * share - half), math.ceil(count * share + half)
    inner = _ranked(sample.values.clone(), [min(max(rank, 1), count) for rank in ranks])
    return (inner[0] if ranks[0] >= 1 else -math.inf), (inner[1] if ranks[1] <= count else math.inf)


def _bracket_held(problem: SelectionProblem, sample: LayerSamples) -> tuple[float, float]:
    """Each layer's counts in the sample are scaled up, so that its floor and cap act as on the whole."""
    scale = problem.sizes / np.maximum(sample.lengths, 1)
    unseen = np.where(sample.lengths == 0, problem.sizes * (problem.k / problem.sizes.sum()), 0.0)

    def crossing(goal: float) -> float:
        if goal <= problem.total(unseen):
            return -math.inf
        if goal > problem.total(sample.lengths * scale + unseen):
            return math.inf
        return _crossing(sample, goal, lambda found: problem.total(found * scale + unseen))

    middle = crossing(problem.k)
    found = sample.count(lambda values: values <= middle)
    moves = (found * scale > problem.floors) & (found * scale < problem.caps)
    variance = (scale**2 * found * (1 - found / np.maximum(sample.lengths, 1)))[moves].sum()
    half = _DEVIATIONS * math.sqrt(variance) + 8 * scale.max()
    return crossing(problem.k - half), crossing(problem.k + half)


def _tally(
    layers: Sequence[Scores],
    problems: Sequence[SelectionProblem],
    brackets: Sequence[_Bracket],
    names: Sequence[int],
    communicator: Communicator,
    rooms: Sequence[float],
) -> list[_Tally | None]:
    """One pass over all layers; None for a problem of which in some process more scores than its room lie inside, for
    then the sample misled."""
    counts = [len(problem.sizes) for problem in problems]
    owners = np.repeat(np.arange(len(problems)), counts).tolist()
    left = [[room] for room in rooms]

    def look(index: int) -> tuple[int, int, int, list]:
        return _tally_layer(layers[index], brackets[owners[index]], left[owners[index]])

    *numbers, parts = zip(*each(look, range(len(layers)), count_threads(layers, communicator)))
    full = [left[owner][0] < 0 for owner in owners]
    below, at_low, at_high, full = communicator.sum_counts(np.array([*numbers, full]))
    # with any NaN, which is neither below nor above
    inside = collect([[] if gone else part for part, gone in zip(parts, full)], names, communicator)
    ends = np.cumsum(counts)[:-1]
    rest = [np.split(array, ends) for array in (below, at_low, at_high, full)]
    return [
        None if gone.any() else _Tally(bracket, *numbers, part)
        for bracket, *numbers, gone, part in zip(brackets, *rest, inside.split(counts))
    ]


def _tally_layer(layer: Scores, bracket: _Bracket, left: list[float]) -> tuple[int, int, int, list]:
    below = at_low = at_high = 0
    parts = []
    for chunk in layer.chunks():
        scores = as_fastest_array(chunk)
        count = np.count_nonzero if isinstance(scores, np.ndarray) else torch.count_nonzero
        lower = scores < bracket.low
        inside = lower == (scores > bracket.high)  # where neither holds
        below += int(count(lower))
        if bracket.tied:
            low, high = scores == bracket.low, scores == bracket.high
            at_low += int(count(low))
            at_high += int(count(high)) if bracket.high > bracket.low else 0
            inside &= ~(low | high)
        part = scores[inside]
        if len(part):
            parts.append(part)
            left[0] -= len(part)  # threads may lose a little of each other's, which moves the limit a little
        if left[0] < 0:
            break
    return below, at_low, at_high, parts


def _decide(problem: SelectionProblem, tally: _Tally) -> Found | None:
    """v, and the units of each layer below it and equal to it; None if v is not in the bracket."""
    low, high = tally.bracket.low, tally.bracket.high
    base = tally.below + tally.at_low
    inside, most = tally.inside, base + tally.inside.lengths
    if problem.total(tally.below) >= problem.k or problem.total(most + tally.at_high) < problem.k:
        return None
    if problem.total(base) >= problem.k:
        value = low
    elif problem.total(most) < problem.k:
        value = high
    elif problem.free:
        value = _ranked(inside.values.clone(), [problem.k - int(base.sum())])[0]
    else:
        value = _crossing(inside, problem.k, lambda found: problem.total(base + found))
    below = (tally.below if value == low else base) + inside.count(lambda values: values < value)
    equal = np.where(value == low, tally.at_low, 0) + inside.count(lambda values: values == value)
    return value + 0.0, below, equal + np.where(value == high, tally.at_high, 0)


def _ranked(values: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """The values of these ascending ranks, counted from 1; may reorder `values`."""
    places = [rank - 1 for rank in ranks]
    if not prefers_numpy(values.device):
        return values.sort()[0][places].tolist()
    found, done = [], 0
    for place in places:  # one after the other is faster than both at once, for the second looks only at the rest
        values.numpy()[done:].partition(place - done)
        found.append(float(values[place]))  # at once: the next partition may move it
        done = place
    return found


def _crossing(parts: LayerSamples, goal: float, total: Callable[[np.ndarray], float]) -> float:
    """min{v: total(#{scores <= v} of each layer) >= goal} by quickselect, where total(0) < goal <= total(all)."""
    values, owner, base = parts.values, parts.owners(), np.zeros_like(parts.lengths)

    def counts(chosen: torch.Tensor) -> np.ndarray:
        return base + torch.bincount(owner[chosen], minlength=len(base)).cpu().numpy()

    while True:
        pivot = values[:: len(values) // 256 + 1].median()
        lower, upto = counts(values < pivot), counts(values <= pivot)
        if total(lower) < goal <= total(upto):
            return float(pivot)
        rest = values < pivot if total(lower) >= goal else values > pivot
        base = base if total(lower) >= goal else upto
        values, owner = values[rest], owner[rest]


def _narrowed(layers: Sequence[Scores], problem: SelectionProblem, communicator: Communicator) -> _Bracket:
    """A bracket that holds v for certain, and few scores besides, found without a sample."""
    low, high = _key(-math.inf), _key(math.inf)
    base = np.zeros_like(problem.sizes)
    few = 2**18 + int(problem.sizes.sum()) // 64
    while True:
        width = (high - low) // _BUCKETS + 1
        counts_LB = communicator.sum_counts(np.stack([_histogram(layer, low, high, width) for layer in layers]))
        upto_LB = base[:, None] + counts_LB.cumsum(1)
        reached = problem.fallen(upto_LB.T).sum(1) >= problem.k
        # NaN, which no bucket takes, may keep all from reaching k; the pass that follows refuses it
        bucket = int(reached.argmax()) if reached.any() else _BUCKETS - 1
        base = upto_LB[:, bucket] - counts_LB[:, bucket]
        low, high = low + bucket * width, min(high, low + (bucket + 1) * width - 1)
        if low == high or counts_LB[:, bucket].sum() <= few:
            return _Bracket(_value(low), _value(high), tied=True)


def _histogram(layer: Scores, low: int, high: int, width: int) -> np.ndarray:
    """(B) scores in each bucket of keys low..high."""
    counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for chunk in layer.chunks():
        bits = (chunk + 0.0).view(torch.int32)  # -0.0 is 0.0
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        keys = keys[(keys >= low) & (keys <= high)]
        counts += torch.bincount((keys - low).div_(width, rounding_mode="floor"), minlength=_BUCKETS).cpu()
    return counts.numpy()


def _key(value: float) -> int:
    """An integer for a float32 value, in the same order."""
    bits = int(np.float32(value).view(np.int32))
    return bits ^ (0x7FFFFFFF if bits < 0 else 0)


def _value(key: int) -> float:
    return float(np.int32(key ^ (0x7FFFFFFF if key < 0 else 0)).view(np.float32)) + 0.0
