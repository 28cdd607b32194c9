"""Sums of saliencies over optimizer steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels import has_kernels
from ..numerics import chunk_size


Saliency = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""saliency(weight, gradient, out): writes the saliency of one step into `out` and returns it; all are float32."""


@dataclass(frozen=True)
class ProductSaliency:
    """f(w·g) or f(g), as a value, so that a kernel can compute it with the sum over steps.

    Args:
        weighted: whether the gradient is multiplied by the weight.
        function: "abs", "square" or "neg".

    Example:
        >>> weight, gradient = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
        >>> ProductSaliency(weighted=True, function="abs")(weight, gradient, torch.empty(2))
        tensor([0.5000, 6.0000])
    """

    weighted: bool
    function: Literal["abs", "square", "neg"]

    def __call__(self, weight: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        product = torch.mul(weight, gradient, out=out) if self.weighted else gradient
        return _FUNCTIONS[self.function](product, out=out)


_FUNCTIONS = {"abs": torch.abs, "square": torch.square, "neg": torch.neg}


class ObservedGradients(ABC):
    """What a criterion keeps of the gradients of one weight, or of the part of it that this rank holds.

    Attributes:
        count: number of optimizer steps in it.
    """

    count: int

    def restart(self) -> None:  # noqa: B027 - most have nothing to do
        """Called after a prune step that has used it."""

    @abstractmethod
    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Returns tensors of the weight's layout by their kind, and counters, for a checkpoint."""

    @abstractmethod
    def saved_dtypes(self, counters: Mapping[str, int]) -> dict[str, torch.dtype]:
        """Returns the dtype of each tensor, by its kind, that `state` returned with these counters."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, int]) -> None:
        """Restores what `state` has returned."""


class GradientStatistic(ObservedGradients):
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
        decay = self._count_step()
        # Weight, gradient, sum and scratch are in the cache together, so that each is read from memory once.
        chunk = max(1, chunk_size(weight.device) // 2)
        scratch = torch.empty(min(chunk, weight.numel()), dtype=torch.float32, device=weight.device)
        chunks = (tensor.reshape(-1).split(chunk) for tensor in (weight.detach(), gradient.detach(), self.total))
        for w, g, total in zip(*chunks, strict=True):
            new = saliency(w.float(), g.float(), scratch[: w.numel()])
            torch.add(new, total, alpha=decay, out=total)

    def _count_step(self) -> float:
        """Counts a step that is added now. Returns the weight of the sum of the earlier steps."""
        decay = 0.0 if self._restarts else self.decay
        self.count = self.count + 1 if decay else 1
        self._restarts = False
        return decay

    def restart(self) -> None:
        """Restarts the sum at the next observation. Until then the present sum stays readable, for a prune step before
        which all gradients overflow."""
        self._restarts = True

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        return {"stat": self.total}, {"count": self.count, "stale": int(self._restarts)}

    def saved_dtypes(self, counters: Mapping[str, int]) -> dict[str, torch.dtype]:
        return {"stat": torch.float32}

    def restore(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, int]) -> None:
        self.total.copy_(tensors["stat"])
        self.count, self._restarts = int(counters["count"]), bool(counters["stale"])


def observe_all(
    observations: Sequence[tuple[GradientStatistic, torch.Tensor, torch.Tensor]], saliency: Saliency
) -> None:
    """Adds the saliencies of one step to several statistics: one kernel for all of them, where there is one.

    Args:
        observations: (statistic, weight, gradient), as for `GradientStatistic.observe`.
        saliency: of the criterion.
    """
    together: dict[tuple, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for statistic, weight, gradient in observations:
        row = weight.detach(), gradient.detach(), statistic.total
        is_simple = weight.device == gradient.device and all(tensor.is_contiguous() for tensor in row)
        if isinstance(saliency, ProductSaliency) and is_simple and weight.numel() and has_kernels(weight.device):
            key = weight.device, weight.dtype, gradient.dtype, statistic._count_step()
            together.setdefault(key, []).append(row)
        else:
            statistic.observe(weight, gradient, saliency)
    for (*_, decay), rows in together.items():
        if isinstance(saliency, ProductSaliency):
            from ..kernels.gradients import add_saliencies

            add_saliencies(rows, decay, saliency.weighted, saliency.function)


def all_finite(gradients: Iterable[torch.Tensor]) -> bool:
    """Whether no gradient holds an inf or a nan. Each is read once, and the device synchronised once.

    Example:
        >>> all_finite([torch.ones(3), torch.tensor([1.0, float("nan")])])
        False
    """
    gradients = list(gradients)
    if gradients and all(gradient.is_cuda for gradient in gradients):
        # Few kernels for all gradients, where a sum would need one for each.
        largest = torch.nn.utils.get_total_norm([grad.detach() for grad in gradients if grad.numel()], math.inf)
        return bool(torch.isfinite(largest))
    sums = [gradient.detach().sum(dtype=torch.float32).to(gradients[0].device) for gradient in gradients]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return True
    # The sum of finite entries can overflow, so the entries themselves decide.
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
