"""Copies of a GPU's tensors in the host's memory, made while the GPU computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor that is on its way back to the GPU."""

    tensor: torch.Tensor
    arrived: torch.cuda.Event

    def wait(self) -> torch.Tensor:
        """Returns the tensor. What the current stream computes from now on waits for it, and the host does not."""
        stream = torch.cuda.current_stream(self.tensor.device)
        stream.wait_event(self.arrived)
        self.tensor.record_stream(stream)
        return self.tensor


class HostMemory:
    """Moves tensors of one CUDA device to the host and back, on a stream of its own.

    Copies take place in the order of the calls. They are asynchronous as the memory of the host is page-locked; where
    the system refuses that, pageable memory is used, which is several times slower.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def store(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy in the host's memory. It is not complete yet, so that `tensor` must not be written to."""
        try:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:
            return tensor.to("cpu")
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host

    def load(self, host: torch.Tensor) -> LoadedTensor:
        """Starts to copy what `store` returned back to the device."""
        with torch.cuda.stream(self._stream):
            tensor = host.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return LoadedTensor(tensor, arrived)
