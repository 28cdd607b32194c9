"""A running sum of per-weight saliencies, taken from the gradients of each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


# Temporaries of this many elements stay in a core's cache, so an observation reads each tensor from memory once.
CHUNK = 128 * 1024

Saliency = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class GradientStatistic:
    """total <- decay·total + saliency(weight, gradient), once per optimizer step.

    Args:
        weight: the tensor observed; the sum has its shape and device, in float32.
        decay: 1 for a plain sum; below 1 for a sum that forgets.

    Example:
        >>> stat = GradientStatistic(torch.ones(2), decay=0.5)
        >>> for gradient in (torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])):
        ...     stat.observe(torch.ones(2), gradient, lambda w, g, out: torch.mul(w, g, out=out).abs_())
        >>> stat.total, stat.count
        (tensor([3.5000, 1.0000]), 2)
    """

    def __init__(self, weight: torch.Tensor, decay: float = 1.0):
        self.total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        self.decay = decay
        self.count = 0
        self._stale = False

    def observe(self, weight: torch.Tensor, gradient: torch.Tensor, saliency: Saliency) -> None:
        """Add one gradient. `saliency(weight, gradient, out)` writes into `out` (float32) and returns it."""
        decay = 0.0 if self._stale else self.decay
        scratch = torch.empty(min(CHUNK, weight.numel()), dtype=torch.float32, device=weight.device)
        parts = (_flat(tensor).split(CHUNK) for tensor in (weight.detach(), gradient.detach(), self.total))
        for w, g, total in zip(*parts, strict=True):
            new = saliency(w.float(), g.float(), scratch[: w.numel()])
            torch.add(new, total, alpha=decay, out=total)
        self.count = self.count + 1 if decay else 1
        self._stale = False

    def renew(self) -> None:
        """Start over with the next observation; until then the present sum stays readable, so that a prune step
        whose observations were all refused (overflowing gradients) still has something true to rank by."""
        self._stale = True

    def merge(self, other: GradientStatistic) -> None:
        """Add what `other` observed of the same weight."""
        self.total += other.total
        self.count += other.count

    def state(self) -> tuple[torch.Tensor, dict[str, int]]:
        """The sum and the counters, for a checkpoint."""
        return self.total, {"count": self.count, "stale": int(self._stale)}

    def restore(self, total: torch.Tensor, counters: dict[str, int]) -> None:
        """The inverse of `state`."""
        self.total.copy_(total)
        self.count, self._stale = int(counters["count"]), bool(counters["stale"])


def all_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether no gradient holds an inf or a nan, at the cost of one read of each.

    Example:
        >>> all_finite([torch.ones(3), torch.tensor([1.0, float("nan")])])
        False
    """
    gradients = list(gradients)
    sums = [gradient.detach().sum(dtype=torch.float32).to(gradients[0].device) for gradient in gradients]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return True
    # A sum of finite numbers can overflow by itself, so look again, one by one.
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)
