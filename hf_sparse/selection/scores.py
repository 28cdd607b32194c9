"""Scores as ranking reads them: what a layer offers, and what was read of many layers, by threads and processes.

Shapes: L layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..distributed import Communicator
from ..numerics import as_fastest_array, chunk_size


_MANY = 4_000_000  # so many are worth starting threads


class Scores(Protocol):
    """The scores of one layer's units, computed when asked for, so that none is ever stored.

    Layers are read by several threads, each layer by one, without gradients. Where several processes decide together,
    each reads a part of every layer, and no part twice.
    """

    numel: int
    """Number of units, in all processes."""
    held: int
    """Number of units that this process reads."""
    device: torch.device
    """Where they are read."""

    def chunks(self) -> Iterator[torch.Tensor]:
        """All scores held, in position order: 1-D float32, which the reader may overwrite and the next may reuse."""

    def sample(self, count: int) -> torch.Tensor:
        """About `count` of the scores held (1-D float32), spread over the layer, the same ones at every call."""


@dataclass(frozen=True)
class LayerSamples:
    """Some scores of each of L layers in one tensor, layer by layer, and how many of each (L)."""

    values: torch.Tensor
    lengths: np.ndarray

    def count(self, test: Callable) -> np.ndarray:
        """(L) how many scores pass a test."""
        hits = test(as_fastest_array(self.values)).nonzero()
        hits = hits[0] if isinstance(hits, tuple) else hits[:, 0].contiguous()
        ends = self.lengths.cumsum()
        library = np if isinstance(hits, np.ndarray) else torch
        before = library.searchsorted(hits, library.asarray(ends))
        return np.diff(before if library is np else before.cpu().numpy(), prepend=0)

    def owners(self) -> torch.Tensor:
        """The layer of each score."""
        return torch.repeat_interleave(torch.from_numpy(self.lengths)).to(self.values.device)

    def split(self, counts: Sequence[int]) -> list[LayerSamples]:
        """The parts of the first counts[0] layers, of the next counts[1], and so on."""
        lengths = np.split(self.lengths, np.cumsum(counts)[:-1])
        values = self.values.split([int(some.sum()) for some in lengths])
        return [LayerSamples(*both) for both in zip(values, lengths, strict=True)]


def collect(
    parts_by_layer: Sequence[list[np.ndarray | torch.Tensor]], names: Sequence[int], communicator: Communicator
) -> LayerSamples:
    """The scores that all processes have read of each of L layers.

    Raises: ValueError, with the layer's entry of `names`, if a score is NaN.
    """
    values = join([part for parts in parts_by_layer for part in parts])
    lengths = np.array([sum(map(len, parts)) for parts in parts_by_layer], dtype=np.int64)
    if communicator.world_size > 1:
        told = communicator.all_gather(torch.from_numpy(lengths), [len(lengths)] * communicator.world_size)
        sizes = [part.tolist() for part in told]
        gathered = communicator.all_gather(values, [sum(some) for some in sizes])
        pieces = [part.split(some) for part, some in zip(gathered, sizes, strict=True)]
        values = torch.cat([piece for layer in zip(*pieces, strict=True) for piece in layer])
        lengths = np.sum(sizes, axis=0, dtype=np.int64)
    found = LayerSamples(values, lengths)
    wrong = found.count(lambda values: values != values)
    if wrong.any():
        raise ValueError(
            f"the scores of layer {names[wrong.argmax()]} must not be NaN, but some are: look at the weights, "
            "gradients or activations they were computed from"
        )
    return found


def join(parts: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return torch.as_tensor(parts[0])
    if all(isinstance(part, np.ndarray) for part in parts):
        return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts]))
    parts = [torch.as_tensor(part) for part in parts]
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    return torch.cat([part.to(device) for part in parts])


def count_threads(layers: Sequence[Scores], communicator: Communicator) -> int:
    """Accelerators need one thread, for streams belong to the caller's; so do several processes, which must speak in
    one order."""
    few = sum(layer.held for layer in layers) < _MANY or len(layers) == 1
    if few or communicator.world_size > 1 or layers[0].device.type != "cpu":
        return 1
    return min(len(layers), torch.get_num_threads())


def each(work: Callable, items: Sequence, threads: int) -> list:
    """work(item) of each item, in order, computed by several threads."""
    results = [None] * len(items)
    queue = deque(range(len(items)))

    def run() -> None:
        with torch.no_grad():  # which threads do not inherit
            while queue:
                try:
                    index = queue.popleft()
                except IndexError:  # another thread was faster
                    return
                results[index] = work(items[index])

    if threads == 1:
        run()
        return results
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(run) for _ in range(threads - 1)]
        run()
        for other in others:
            other.result()
    return results


_RUN = 16  # neighbours sampled together: they share a cache line


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
        size = chunk_size(flat.device)
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
