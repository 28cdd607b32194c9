"""The last gradients of a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .gradients import ObservedGradients


class GradientHistory(ObservedGradients):
    """A ring of the last gradients of a weight, one of each optimizer step: `length` numbers for each weight.

    The entries have the layout of the weight, so that any part of it can be saved and restored. Prune steps leave the
    ring as it is.

    Args:
        weight: gives the shape and device.
        length: the number of gradients that are kept.
        dtype: in which they are kept: bfloat16 has the range of float32, and half its size.

    Attributes:
        gradients: the kept gradients. Their order is that of the ring, which starts anew with every `length` of them.
        count: number of gradients that were observed.

    Example:
        >>> history = GradientHistory(torch.zeros(2), length=2, dtype=torch.float32)
        >>> for step in range(3):
        ...     history.observe(torch.tensor([step, -1.0]))
        >>> history.gradients, history.count
        ([tensor([ 2., -1.]), tensor([ 1., -1.])], 3)
    """

    def __init__(self, weight: torch.Tensor, length: int, dtype: torch.dtype = torch.bfloat16):
        self.length = length
        self._like = torch.empty(0, dtype=dtype, device=weight.device)
        self._shape = weight.shape
        self.gradients: list[torch.Tensor] = []
        self.count = 0

    def observe(self, gradient: torch.Tensor) -> None:
        """Keeps a gradient of the weight's shape, in place of the earliest one where there are `length`."""
        slot = self.count % self.length
        if slot == len(self.gradients):
            self.gradients.append(self._like.new_empty(self._shape))
        self.gradients[slot].copy_(gradient.detach())
        self.count += 1

    def padded(self) -> list[torch.Tensor]:
        """Returns `length` gradients: those that are kept, and zeros."""
        zeros = self._like.new_zeros(self._shape)
        return self.gradients + [zeros] * (self.length - len(self.gradients))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        tensors = {f"gradient{slot}": gradient for slot, gradient in enumerate(self.gradients)}
        return tensors, {"count": self.count, "stale": 0}

    def saved_dtypes(self, counters: Mapping[str, int]) -> dict[str, torch.dtype]:
        count = min(int(counters["count"]), self.length)
        return {f"gradient{slot}": self._like.dtype for slot in range(count)}

    def restore(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, int]) -> None:
        self.gradients = [tensor.to(self._like.device, self._like.dtype, copy=True) for tensor in tensors.values()]
        self.count = int(counters["count"])
