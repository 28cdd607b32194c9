"""Collective operations between the ranks that prune together.

All ranks call the same methods in the same order, with arguments of the same shapes where nothing else is said.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist


class Communicator(ABC):
    """The ranks that hold parts or replicas of the weights.

    Args:
        rank: of this process, 0..world_size - 1.
        world_size: number of ranks.
    """

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size

    @abstractmethod
    def sum_counts(self, counts: np.ndarray) -> np.ndarray:
        """Returns the int64 sum over all ranks, elementwise."""

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replaces a floating-point `tensor` by its sum over all ranks, bit-identical on each."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor, lengths: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Returns the 1-D tensor of every rank.

        Args:
            tensor: of this rank; the dtype is the same on all ranks, the length may differ.
            lengths: of every rank's tensor. None if unknown, which costs one more collective.
        """

    @abstractmethod
    def all_to_all(self, tensors: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
        """Sends the 1-D tensor `tensors[r]` to each rank r, and returns what each rank sent to this one.

        Args:
            tensors: one for each rank, all of one dtype and device.
            lengths: of the tensors to receive, by source rank.
        """

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self.sum_counts(np.array([flag], dtype=np.int64))[0])

    def raise_together(self, error: Exception | None) -> None:
        """Raises on all ranks if one has an error, so that no rank waits in a collective that others never reach.

        Raises:
            Exception: `error` itself on the ranks that have one, a ValueError on the others.
        """
        if self.any(error is not None):
            raise error or ValueError("another process stopped with an error: its own message says what.")


class SingleProcess(Communicator):
    """One rank that holds every weight whole. Nothing is copied: results are the arguments themselves."""

    def __init__(self) -> None:
        super().__init__(rank=0, world_size=1)

    def sum_counts(self, counts: np.ndarray) -> np.ndarray:
        return counts

    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def all_gather(self, tensor: torch.Tensor, lengths: Sequence[int] | None = None) -> list[torch.Tensor]:
        return [tensor]

    def all_to_all(self, tensors: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
        return list(tensors)


SINGLE_PROCESS = SingleProcess()


class DistributedCommunicator(Communicator):
    """The default process group of torch.distributed. Tensors may be on any device: the backend's device is used to
    send them."""

    def __init__(self) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())
        # A mixed backend ("cpu:gloo,cuda:nccl") sends CPU tensors; NCCL alone sends only those of a GPU.
        has_gloo = "gloo" in str(dist.get_backend_config())
        self._device = torch.device("cpu") if has_gloo else torch.device("cuda", torch.cuda.current_device())

    def sum_counts(self, counts: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(np.ascontiguousarray(counts, dtype=np.int64)).to(self._device, copy=True)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        total = tensor if tensor.device.type == self._device.type else tensor.to(self._device)
        dist.all_reduce(total)
        if total is not tensor:
            tensor.copy_(total)

    def all_gather(self, tensor: torch.Tensor, lengths: Sequence[int] | None = None) -> list[torch.Tensor]:
        if lengths is None:
            counts = np.zeros(self.world_size, dtype=np.int64)
            counts[self.rank] = len(tensor)
            lengths = self.sum_counts(counts).tolist()
        itemsize = tensor.element_size()
        # torch.distributed.all_gather needs equal lengths: shorter tensors are padded.
        padded = torch.zeros(max(lengths) * itemsize, dtype=torch.uint8, device=self._device)
        padded[: len(tensor) * itemsize] = _as_bytes(tensor)
        gathered = [torch.empty_like(padded) for _ in lengths]
        if len(padded):
            dist.all_gather(gathered, padded)
        return [
            data[: length * itemsize].view(tensor.dtype).to(tensor.device)
            for data, length in zip(gathered, lengths, strict=True)
        ]

    def all_to_all(self, tensors: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
        dtype, device = tensors[0].dtype, tensors[0].device
        received_bytes = [length * tensors[0].element_size() for length in lengths]
        source = torch.cat([_as_bytes(tensor) for tensor in tensors]).to(self._device)
        target = torch.empty(sum(received_bytes), dtype=torch.uint8, device=self._device)
        dist.all_to_all_single(target, source, received_bytes, [tensor.nbytes for tensor in tensors])
        return [data.view(dtype).to(device) for data in target.split(received_bytes)]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    if not len(tensor):  # its stride may be anything, which `view` refuses
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return tensor.detach().contiguous().view(torch.uint8)


def get_communicator() -> Communicator:
    """Returns all ranks of the default process group, or `SINGLE_PROCESS` where there is none or it has one rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    return DistributedCommunicator()


@contextmanager
def raise_on_all_ranks(*types: type[Exception]) -> Iterator[None]:
    """Runs the block on every rank and, if one rank raises an error of `types` in it, raises on all ranks, so that no
    rank waits for one that has stopped. Ranks without an error of their own raise a ValueError.

    Example:
        >>> with raise_on_all_ranks(OSError):
        ...     raise FileNotFoundError("a.txt")
        Traceback (most recent call last):
            ...
        FileNotFoundError: a.txt
    """
    error = None
    try:
        yield
    except types as caught:
        error = caught
    get_communicator().raise_together(error)


def parse_device(name: str, option: str = "device") -> torch.device:
    """Returns the device of a name such as "cpu" or "cuda:1".

    Args:
        name: of the device.
        option: that named it.

    Raises:
        ValueError: there is no such device.

    Example:
        >>> parse_device("cpu")
        device(type='cpu')
        >>> parse_device("gpu")
        Traceback (most recent call last):
        ...
        ValueError: `device` is "gpu": it must be one of torch, such as cpu, cuda or cuda:1.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'`{option}` is "{name}": it must be one of torch, such as cpu, cuda or cuda:1.') from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        found = "no CUDA device" if count == 0 else f"{count} CUDA device{'s' * (count > 1)}, counted from 0"
        remedy = f'`{option}="cpu"`' if count == 0 else f'`{option}="cuda:{count - 1}"`'
        raise ValueError(f"`{option}` is {name}, but torch finds {found} here: use {remedy}.")
    return device


def init_distributed(device: str | None = None) -> torch.device:
    """Initialises the process group if torchrun or accelerate launched several processes.

    Args:
        device: to compute on. "cpu" also makes ranks communicate over the CPU. None for this rank's GPU, or the CPU
            where there is none.

    Returns: the device to compute on.

    Raises:
        ValueError: there is no such device.
    """
    requested = parse_device(device) if device else None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        default = PartialState(cpu=device == "cpu").device
    else:
        default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return requested or default
