"""The processes that decide together, and the few things they ever tell each other: sums, and parts of tensors.

Everything is counted in `bytes_received`, the bytes that this process has received.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch


class Communicator:
    """A process that decides alone: it has every weight whole."""

    rank = 0
    world_size = 1
    bytes_received = 0

    def sum_counts(self, numbers: np.ndarray) -> np.ndarray:
        """The sum of every process's int64 array; all have the same shape."""
        return numbers

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Make `tensor`, of floats, the sum of every process's, bit for bit the same in all of them."""

    def all_gather(self, tensor: torch.Tensor, lengths: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Every process's 1-D tensor, of any length each; where all know the `lengths`, they need not be told."""
        return [tensor]

    def all_to_all(self, tensors: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
        """Send the 1-D tensor tensors[r] to each process r. Returns what each sent to this one, of these lengths."""
        return list(tensors)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.sum_counts(np.array([flag], dtype=np.int64))[0])

    def raise_together(self, error: Exception | None) -> None:
        """Raise in all processes when one has an error, so that none waits for another that has stopped."""
        if self.any(error is not None):
            raise error or ValueError("another process stopped with an error: its own message says what.")


SINGLE_PROCESS = Communicator()


class DistributedCommunicator(Communicator):
    """All processes of the default group."""

    def __init__(self):
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.bytes_received = 0
        # A group of several backends ("cpu:gloo,cuda:nccl") takes tensors of the CPU, NCCL alone only those of a GPU.
        on_cpu = (
            "gloo" in str(dist.get_backend_config())
            if hasattr(dist, "get_backend_config")
            else dist.get_backend() == "gloo"
        )
        self._device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def sum_counts(self, numbers):
        total = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(self._device, copy=True)
        self._dist.all_reduce(total)
        self.bytes_received += total.nbytes * (self.world_size - 1)
        return total.cpu().numpy()

    def all_reduce(self, tensor):
        # Where the tensor cannot travel as it is, a copy does.
        total = tensor if tensor.device.type == self._device.type else tensor.to(self._device)
        self._dist.all_reduce(total)
        self.bytes_received += total.nbytes * (self.world_size - 1)
        if total is not tensor:
            tensor.copy_(total)

    def all_gather(self, tensor, lengths=None):
        if lengths is None:
            lengths = np.zeros(self.world_size, dtype=np.int64)
            lengths[self.rank] = len(tensor)
            lengths = self.sum_counts(lengths).tolist()
        width = tensor.element_size()
        own = torch.zeros(max(lengths) * width, dtype=torch.uint8, device=self._device)
        own[: len(tensor) * width] = _bytes(tensor)
        parts = [torch.empty_like(own) for _ in lengths]
        if len(own):
            self._dist.all_gather(parts, own)
        self.bytes_received += len(own) * (self.world_size - 1)
        return [
            part[: length * width].view(tensor.dtype).to(tensor.device)
            for part, length in zip(parts, lengths, strict=True)
        ]

    def all_to_all(self, tensors, lengths):
        kind, device = tensors[0].dtype, tensors[0].device
        received = [length * tensors[0].element_size() for length in lengths]
        source = torch.cat([_bytes(tensor) for tensor in tensors]).to(self._device)
        target = torch.empty(sum(received), dtype=torch.uint8, device=self._device)
        self._dist.all_to_all_single(target, source, received, [tensor.nbytes for tensor in tensors])
        self.bytes_received += sum(received) - received[self.rank]
        return [part.view(kind).to(device) for part in target.split(received)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if not len(tensor):  # whose stride may be anything
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.detach().contiguous().view(torch.uint8)


def get_communicator() -> Communicator:
    """Every process of this run, or this one alone."""
    dist = getattr(torch, "distributed", None)
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    return DistributedCommunicator()


def init_distributed(device: str | None = None) -> torch.device:
    """Join the processes that a launcher has started, if one has.

    Args:
        device: of this process; "cpu" also makes the processes talk over the CPU. Left out: the GPU that is this
            process's, or the CPU where there is none.

    Returns: where this process computes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        shared = PartialState(cpu=device == "cpu").device
    else:
        shared = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device) if device else shared
