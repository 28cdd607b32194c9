"""Exact selection and 2:4 masks, relative to reading the weights: `python scripts/benchmarks/bench.py rank | nm`.

Times are medians, divided by the time of one `sum()` of each of the same tensors in the same process: a read. With one
thread, CPU time is measured, which other processes disturb less; with several, wall-clock time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from memory import extra_bytes

from hf_sparse.numerics import CPU_CHUNK
from hf_sparse.patterns.n_of_m_kernel import keep_n_of_m
from hf_sparse.selection.scores import TensorScores
from hf_sparse.selection.threshold import find_threshold, find_thresholds


HIDDEN = 768


def seconds_once(work: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Returns the median time of `repeats` calls, after one that is not counted."""
    work()
    return statistics.median(seconds_once(work) for _ in range(repeats))


def reads(work: Callable[[], object], weights: list[torch.Tensor], repeats: int) -> float:
    """Returns the time of `work` in reads of the weights: the median ratio of adjacent calls, with similar noise."""
    work()
    return statistics.median(seconds_once(work) / seconds(lambda: read(weights), 3) for _ in range(repeats))


def read(weights: list[torch.Tensor]) -> None:
    for weight in weights:
        weight.sum()


def bert_like(millions: int) -> list[torch.Tensor]:
    """Returns the matrices of an encoder: per block four of HIDDEN x HIDDEN and two with 4 HIDDEN."""
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)]
    generator = torch.Generator().manual_seed(0)
    weights, left = [], millions * 1_000_000
    while left > 0:
        shape = shapes[len(weights) % len(shapes)]
        scale = 0.01 * (1 + torch.rand(shape[0], 1, generator=generator))
        weights.append(torch.randn(shape, generator=generator) * scale)
        left -= weights[-1].numel()
    return weights


def magnitudes(weights: list[torch.Tensor]) -> list[TensorScores]:
    return [TensorScores(weight, magnitude=True) for weight in weights]


def write_masks(weights: list[torch.Tensor], thresholds: list, masks: list[torch.Tensor]) -> None:
    for scores, threshold, mask in zip(magnitudes(weights), thresholds, masks):
        start, ties, flat = 0, threshold.num_ties, mask.view(torch.bool).view(-1)
        for chunk in scores.chunks():
            kept, ties = threshold.keep_mask(chunk, ties)
            flat[start : start + len(kept)] = kept
            start += len(kept)


def joined(weights: list[torch.Tensor], k: int) -> float:
    return float(torch.cat([weight.view(-1) for weight in weights]).abs_().kthvalue(k)[0])


def rank(options: argparse.Namespace) -> None:
    weights = bert_like(options.millions)
    total = sum(weight.numel() for weight in weights)
    print(f"exact selection by |w| over {total / 1e6:.0f}M weights in {len(weights)} layers")
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread(s), a read takes {seconds(lambda: read(weights), options.repeats) * 1e3:.1f} ms")
        for share in (0.5, 0.9):
            k = int(share * total)
            ratio = reads(lambda: find_thresholds(magnitudes(weights), k), weights, options.repeats)
            print(f"  {share:.0%} over all layers: {ratio:.2f} reads")
        caps = [int(0.92 * weight.numel()) for weight in weights]
        ratio = reads(lambda: find_thresholds(magnitudes(weights), k, caps=caps), weights, options.repeats)
        print(f"  90%, at most 92% of each: {ratio:.2f} reads")
        counts = [int(0.9 * weight.numel()) for weight in weights]
        ratio = reads(lambda: [*map(find_threshold, magnitudes(weights), counts)], weights, options.repeats)
        print(f"  90% of each layer: {ratio:.2f} reads")
        thresholds = find_thresholds(magnitudes(weights), k)
        masks = [torch.ones(weight.shape, dtype=torch.int8) for weight in weights]
        ratio = reads(lambda: write_masks(weights, thresholds, masks), weights, options.repeats)
        assert sum(mask.sum(dtype=torch.int64) for mask in masks) == total - k
        print(f"  writing the int8 masks: {ratio:.2f} reads")
        flat = torch.cat([weight.view(-1) for weight in weights])
        for count in (12, 200, 2000):
            parts = list(flat.tensor_split(count))
            select = partial(find_thresholds, magnitudes(parts), k)
            ratio, time_taken = reads(select, parts, options.repeats), seconds(select, options.repeats)
            print(f"  90% over the same weights in {count} layers: {ratio:.2f} reads, {time_taken * 1e3:.0f} ms")
        del flat
    size = 4 * total
    print(f"peak beyond the weights: {extra_bytes(lambda: find_thresholds(magnitudes(weights), k)) / size:.1%}")
    if options.side_by_side:
        ratio = seconds_once(lambda: joined(weights, k)) / seconds(lambda: read(weights), options.repeats)
        extra = extra_bytes(lambda: joined(weights, k)) / size
        print(f"cat + kthvalue: {ratio:.1f} reads, peak {extra:.0%}")


def masks_2_of_4(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    groups, mask = weight.view(-1, 4), mask.view(-1, 4)
    buffer = torch.empty(CPU_CHUNK // 4, 4)
    for start in range(0, len(groups), len(buffer)):
        part = groups[start : start + len(buffer)]
        scores = torch.abs(part, out=buffer[: len(part)])
        mask[start : start + len(part)] = keep_n_of_m(scores, 2)
    return mask


def all_masks_2_of_4(weights: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
    """Runs layer by layer, on as many threads as a selection uses."""
    if torch.get_num_threads() == 1:
        list(map(masks_2_of_4, weights, masks))
        return
    with ThreadPoolExecutor(min(len(weights), torch.get_num_threads())) as pool:
        list(pool.map(masks_2_of_4, weights, masks))


def masks_by_topk(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.view(-1, 4)
    places = groups.abs().topk(2, dim=1)[1]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, places, True)


def nm(options: argparse.Namespace) -> None:
    constant = masks_2_of_4(torch.ones(1024, 1024), torch.empty(1024, 1024, dtype=torch.bool))
    assert torch.equal(constant, torch.tensor([False, False, True, True]).expand_as(constant))
    rows, columns = options.layer
    lists = {
        f"{options.millions}M weights": bert_like(options.millions),
        f"one layer, {rows} x {columns}": [torch.randn(rows, columns)],
    }
    for name, weights in lists.items():
        masks = [torch.zeros(weight.shape, dtype=torch.bool) for weight in weights]
        for threads in options.threads:
            torch.set_num_threads(threads)
            ratio = reads(lambda: all_masks_2_of_4(weights, masks), weights, options.repeats)
            print(f"{name}, {threads} thread(s): 2:4 masks of |w| in {ratio:.2f} reads")
        if options.side_by_side:
            few = weights[:6]
            ratio = reads(lambda: [masks_by_topk(weight) for weight in few], few, 1)
            print(f"{name}, {threads} thread(s): topk and scatter in {ratio:.1f} reads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--millions", type=int, default=110, help="number of weights in millions")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--side-by-side", action="store_true", help="also measure the simplest way, which is slow")


def add_layer(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--layer", type=int, nargs=2, default=(4096, 11008), help="rows and columns of one layer")
