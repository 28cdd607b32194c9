"""Sums of saliencies over optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ..numerics import chunk_size


Saliency = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""saliency(weight, gradient, out): writes the saliency of one step into `out` and returns it; all are float32."""


class GradientStatistic:
    """A decayed sum of saliencies, updated once per optimizer step:

        total <- decay * total + saliency(weight, gradient)

    Args:
        weight: gives the shape and device of the sum.
        decay: 1 for a plain sum; below 1, earlier steps count less.

    Attributes:
        total: the sum, float32.
        count: number of steps in it.

    Example:
        >>> statistic = GradientStatistic(torch.ones(2), decay=0.5)
        >>> for gradient in (torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])):
        ...     statistic.observe(torch.ones(2), gradient, lambda w, g, out: torch.mul(w, g, out=out).abs_())
        >>> statistic.total, statistic.count
        (tensor([3.5000, 1.0000]), 2)
    """

    def __init__(self, weight: torch.Tensor, decay: float = 1.0):
        self.total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        self.decay = decay
        self.count = 0
        self._restarts = False

    def observe(self, weight: torch.Tensor, gradient: torch.Tensor, saliency: Saliency) -> None:
        """Adds the saliency of one step.

        Args:
            weight, gradient: of the shape of `total`, any floating dtype; not modified.
            saliency: called with chunks of the flattened tensors.
        """
        decay = 0.0 if self._restarts else self.decay
        # Weight, gradient, sum and scratch are in the cache together, so that each is read from memory once.
        chunk = max(1, chunk_size(weight.device) // 2)
        scratch = torch.empty(min(chunk, weight.numel()), dtype=torch.float32, device=weight.device)
        chunks = (tensor.reshape(-1).split(chunk) for tensor in (weight.detach(), gradient.detach(), self.total))
        for w, g, total in zip(*chunks, strict=True):
            new = saliency(w.float(), g.float(), scratch[: w.numel()])
            torch.add(new, total, alpha=decay, out=total)
        self.count = self.count + 1 if decay else 1
        self._restarts = False

    def restart(self) -> None:
        """Restarts the sum at the next observation. Until then the present sum stays readable, for a prune step before
        which all gradients overflow."""
        self._restarts = True

    def state(self) -> tuple[torch.Tensor, dict[str, int]]:
        """Returns the sum and the counters, for a checkpoint."""
        return self.total, {"count": self.count, "stale": int(self._restarts)}

    def restore(self, total: torch.Tensor, counters: Mapping[str, int]) -> None:
        """Restores what `state` has returned."""
        self.total.copy_(total)
        self.count, self._restarts = int(counters["count"]), bool(counters["stale"])


def all_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether no gradient holds an inf or a nan. Each is read once, and the device synchronised once.

    Example:
        >>> all_finite([torch.ones(3), torch.tensor([1.0, float("nan")])])
        False
    """
    gradients = list(gradients)
    sums = [gradient.detach().sum(dtype=torch.float32).to(gradients[0].device) for gradient in gradients]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return True
    # The sum of finite entries can overflow, so the entries themselves decide.
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
