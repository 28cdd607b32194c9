"""Importance scores of the units of a layer, computed in chunks whenever they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from ..kernels import StoredScores
from ..numerics import chunk_size


_RUN_LENGTH = 16  # neighbouring samples share a cache line


class Scores(Protocol):
    """The scores of the units of one layer, which are computed on demand and never stored.

    Every rank reads a part of each layer, and no two ranks read the same unit. One thread at a time reads a layer, in
    any gradient mode.
    """

    @property
    def numel(self) -> int:
        """Number of units of the layer, over all ranks."""

    @property
    def local_numel(self) -> int:
        """Number of units that this rank reads."""

    @property
    def device(self) -> torch.device:
        """Device of the scores."""

    @property
    def stored(self) -> StoredScores | None:
        """Where kernels find the scores in the order of their position; None where they must be computed."""

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yields the scores of all local units in the order of their position, as 1-D float32 tensors.

        The caller may overwrite a chunk. The memory of a chunk may be reused for the next one.
        """

    def sample(self, count: int) -> torch.Tensor:
        """Returns about `count` of the local scores (1-D float32) from evenly spaced positions, the same at each
        call."""


class TensorScores:
    """The entries of a tensor, or their magnitudes, as scores.

    Args:
        tensor: of any shape and floating-point dtype; converted to float32 in chunks.
        magnitude: whether the scores are |w| instead of w.

    Example:
        >>> scores = TensorScores(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]), magnitude=True)
        >>> [chunk.tolist() for chunk in scores.chunks()]
        [[1.0, 2.0, 3.0, 4.0]]
    """

    def __init__(self, tensor: torch.Tensor, magnitude: bool = False):
        self.tensor = tensor.detach()
        self.magnitude = magnitude
        self.numel = self.local_numel = tensor.numel()
        self.device = tensor.device

    @property
    def stored(self) -> StoredScores | None:
        return StoredScores(self.tensor, self.magnitude) if self.tensor.is_contiguous() else None

    def chunks(self) -> Iterator[torch.Tensor]:
        flat, size = self.tensor.reshape(-1), chunk_size(self.device)
        buffer = torch.empty(min(size, self.numel), dtype=torch.float32, device=self.device)
        if self.device.type == "cpu" and flat.dtype == torch.float32:
            # numpy computes in the calling thread, where torch would start threads of its own
            source, target = flat.numpy(), buffer.numpy()
            for start in range(0, self.numel, size):
                part = source[start : start + size]
                if self.magnitude:
                    np.abs(part, out=target[: len(part)])
                else:
                    np.copyto(target[: len(part)], part)
                yield torch.from_numpy(target[: len(part)])
        else:
            for start in range(0, self.numel, size):
                scores = buffer[: min(size, self.numel - start)].copy_(flat[start : start + size])
                yield scores.abs_() if self.magnitude else scores

    def sample(self, count: int) -> torch.Tensor:
        scores = sample_runs(self.tensor.reshape(-1), count).to(torch.float32, copy=True).view(-1)
        return scores.abs_() if self.magnitude else scores


def sample_layout(numel: int, count: int) -> tuple[int, int, int]:
    """Returns evenly spaced positions of about `count` of `numel` entries.

    Entries are sampled in short runs. The stride between runs is odd, so that it is no multiple of an even row length.

    Returns:
        (num_runs, stride, run_length): the positions r * stride + i for r < num_runs and i < run_length. Where
        `count` is not much smaller than `numel`, (1, numel, numel): all entries.

    Example:
        >>> sample_layout(10_000, 48)
        (3, 3327, 16)
    """
    num_runs = max(1, round(count / _RUN_LENGTH))
    stride = (numel - _RUN_LENGTH) // num_runs
    stride -= 1 - stride % 2
    return (num_runs, stride, _RUN_LENGTH) if stride >= 2 * _RUN_LENGTH else (1, numel, numel)


def sample_runs(flat: torch.Tensor, count: int) -> torch.Tensor:
    """Returns a view (num_runs, run_length) of about `count` entries of a 1-D tensor, see `sample_layout`."""
    num_runs, stride, run_length = sample_layout(len(flat), count)
    step = flat.stride(0)
    return flat.as_strided((num_runs, run_length), (stride * step, step), flat.storage_offset())
