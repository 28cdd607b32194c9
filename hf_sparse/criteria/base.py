"""Base classes of importance criteria."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..methods import MethodRegistry
from ..requires import Requires


@dataclass(frozen=True)
class TensorEntries:
    """The scores of a criterion that are the entries of the weight or of its statistic, or their magnitudes.

    As a value in place of a method `score`, which it computes, it lets kernels read the scores where they are.

    Args:
        source: the tensor.
        magnitude: whether the scores are the magnitudes of the entries.

    Example:
        >>> TensorEntries("weight", magnitude=True)(torch.tensor([0.5, -2.0]), None)
        tensor([0.5000, 2.0000])
    """

    source: Literal["weight", "statistic"]
    magnitude: bool = False

    def __call__(self, weight: torch.Tensor, statistic: torch.Tensor | None) -> torch.Tensor:
        scores = self.entries(weight, statistic).to(torch.float32, copy=True)
        return scores.abs_() if self.magnitude else scores

    def entries(self, weight: torch.Tensor, statistic: torch.Tensor | None) -> torch.Tensor:
        """Returns the tensor, detached."""
        if self.source == "weight":
            return weight.detach()
        if statistic is None:
            raise ValueError("the scores are those of the statistic, but it is None")
        return statistic.detach()


class Criterion(ABC):
    """An importance criterion: one score per weight; higher scores are kept.

    A criterion is elementwise: `score` is called with any part of a weight, of any shape, and the same part of its
    statistic. What depends on whole rows or columns of a matrix goes into the statistic, by `prepare_statistic`. A
    subclass is registered with `register_criterion`; when it is a frozen dataclass, its fields are its options
    (`criterion_kwargs`).

    Example:
        >>> from dataclasses import dataclass
        >>> @register_criterion("power")
        ... @dataclass(frozen=True)
        ... class Power(Criterion):
        ...     exponent: float = 2.0
        ...
        ...     def score(self, weight: torch.Tensor, statistic: torch.Tensor | None) -> torch.Tensor:
        ...         return weight.detach().float().abs() ** self.exponent
        >>> CRITERIA.create("power", {"exponent": 3.0}).score(torch.tensor([-2.0]), None)
        tensor([8.])
    """

    requires: ClassVar[Requires] = Requires.NOTHING
    """What `score` gets as `statistic`: nothing (None), `POSITION` (int64), `GRADIENTS` (the sum of
    `GradientCriterion.saliency`, float32), `INPUT_NORMS` (the norm of each weight's input, or what `prepare_statistic`
    makes of it, float32, of a shape that broadcasts to the weight's), `INPUT_VARIANCES` (its variance, likewise) or
    `BLOCK_INFLUENCES` (a number, the same for all weights of a block)."""
    default_scope: ClassVar[str] = "global"
    """The ranking scope of the criterion's paper, where the options name none."""

    def prepare_statistic(self, weight_RC: torch.Tensor, norms_C: torch.Tensor) -> torch.Tensor:
        """Returns what `score` gets as `statistic`, for a criterion that requires norms or variances of inputs.

        Args:
            weight_RC: the whole matrix, of any floating dtype; not modified.
            norms_C: the norms (or variances) of its inputs, float32; not modified.

        Returns:
            float32, of shape (C,), as here, where it is the second argument, or (R, C).
        """
        return norms_C

    @property
    def prepares_statistic(self) -> bool:
        """Whether `prepare_statistic` may return a value for each weight."""
        return type(self).prepare_statistic is not Criterion.prepare_statistic

    @abstractmethod
    def score(self, weight: torch.Tensor, statistic: torch.Tensor | None) -> torch.Tensor:
        """Returns the scores of a weight.

        Args:
            weight: any floating dtype; not modified.
            statistic: see `requires`; not modified.

        Returns:
            A tensor of the weight's shape: float32, detached, finite where both arguments are.
        """


class UnitCriterion(Criterion):
    """A criterion that scores whole coupled units from the matrix that reads them, all units of it together.

    One-shot pruning only. Registered with `register_criterion` like any other.
    """

    requires = Requires.GRAM
    default_scope = "layer"

    def score(self, weight: torch.Tensor, statistic: torch.Tensor | None) -> torch.Tensor:
        """Raises TypeError: single weights have no scores of their own."""
        raise TypeError(f"{type(self).__name__} scores whole units, with `score_units`")

    @abstractmethod
    def score_units(
        self, weight_RI: torch.Tensor, gram_II: torch.Tensor, width: int, count: int | None = None
    ) -> torch.Tensor:
        """Returns the scores of the units of a matrix.

        Args:
            weight_RI: the matrix, (R, I), of any floating dtype; not modified.
            gram_II: the symmetric Gram matrix of its inputs, centered if the layer has a bias; not modified.
            width: number of adjacent inputs that a unit owns; the matrix has I / width units.
            count: how many of the units will be pruned: units that are surely kept may have the score inf. If None,
                scores of different matrices are compared, and all of them must be finite.

        Returns:
            (I / width) float32.
        """


class GradientCriterion(Criterion):
    """A criterion whose statistic is a decayed sum over optimizer steps:

        total <- decay * total + saliency(weight, gradient)

    Its scores must keep their order when all gradients are multiplied by one positive constant, because the scale of
    the loss depends on gradient accumulation and on the number of processes.

    Example:
        >>> class Sensitivity(GradientCriterion):
        ...     def saliency(self, weight: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        ...         return torch.mul(weight, gradient, out=out).abs_()
        >>> Sensitivity().saliency(torch.tensor([2.0]), torch.tensor([-3.0]), torch.empty(1))
        tensor([6.])
    """

    requires: ClassVar[Requires] = Requires.GRADIENTS
    decay: float = 1.0
    """1 for a plain sum; below 1, earlier steps count less."""
    persistent: ClassVar[bool] = False
    """Whether the sum continues after a prune step; otherwise it restarts."""

    @abstractmethod
    def saliency(self, weight: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes the saliency of one step into `out` and returns it. All three are float32 and of one shape."""

    score: Any = TensorEntries("statistic")


CRITERIA = MethodRegistry(
    "criterion",
    Criterion,
    {
        Requires.NOTHING: Criterion,
        Requires.POSITION: Criterion,
        Requires.GRADIENTS: GradientCriterion,
        Requires.INPUT_NORMS: Criterion,
        Requires.INPUT_VARIANCES: Criterion,
        Requires.BLOCK_INFLUENCES: Criterion,
        Requires.GRAM: UnitCriterion,
    },
)
register_criterion = CRITERIA.register
