"""Base classes of importance criteria."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..methods import MethodRegistry
from ..requires import Requires
from ..statistics import GradientHistory, GradientStatistic, ObservedGradients, observe_all


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
    `GradientCriterion.saliency`, float32; with `GRADIENT_HISTORY` what `GradientHistoryCriterion.weight_scores`
    returns), `INPUT_NORMS` (the norm of each weight's input, or what `prepare_statistic` makes of it, float32, of a
    shape that broadcasts to the weight's), `INPUT_VARIANCES` (its variance, likewise) or `BLOCK_INFLUENCES` (a number,
    the same for all weights of a block)."""
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


class ObservingCriterion(Criterion):
    """A criterion that observes the gradient of each optimizer step. See `GradientCriterion`."""

    requires: ClassVar[Requires] = Requires.GRADIENTS

    @abstractmethod
    def new_statistic(self, weight: torch.Tensor) -> ObservedGradients:
        """Returns what keeps the gradients of a weight, or of a part of it; none are observed yet."""

    @abstractmethod
    def observe(self, observations: Sequence[tuple[Any, torch.Tensor, torch.Tensor]]) -> None:
        """Adds one optimizer step: the statistic (of `new_statistic`), the weight and the gradient of each weight."""


class GradientCriterion(ObservingCriterion):
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

    decay: float = 1.0
    """1 for a plain sum; below 1, earlier steps count less."""
    persistent: ClassVar[bool] = False
    """Whether the sum continues after a prune step; otherwise it restarts."""

    @abstractmethod
    def saliency(self, weight: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes the saliency of one step into `out` and returns it. All three are float32 and of one shape."""

    score: Any = TensorEntries("statistic")

    def new_statistic(self, weight: torch.Tensor) -> ObservedGradients:
        return GradientStatistic(weight, self.decay)

    def observe(self, observations: Sequence[tuple[Any, torch.Tensor, torch.Tensor]]) -> None:
        observe_all(observations, self.saliency)


class GradientHistoryCriterion(ObservingCriterion):
    """A criterion that scores a weight by the last gradients of all weights of a block of adjacent inputs of its row,
    and can update the weights that a prune step leaves in that block.

    Blocks of rows, in which the criterion computes, have a size of their own (`block_columns`); the units that are
    pruned are those of the pattern. Scores must keep their order when all gradients are multiplied by one positive
    constant.

    Shapes: M gradients, R output rows, P kernel positions, C inputs of a matrix, or of a part of it with whole blocks.

    Example:
        >>> class LargestGradient(GradientHistoryCriterion):
        ...     num_gradients = 2
        ...     def block_columns(self, columns, width):
        ...         return columns
        ...     def weight_scores(self, weight_RPC, kept_RPC, gradients, block, width):
        ...         return torch.stack([gradient.float().abs() for gradient in gradients]).amax(0)
        >>> weight, mask = torch.zeros(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool)
        >>> LargestGradient().weight_scores(weight, mask, [weight + 1, weight - 2], 2, 1)
        tensor([[[2., 2.]]])
    """

    requires: ClassVar[Requires] = Requires.GRADIENTS | Requires.GRADIENT_HISTORY
    num_gradients: int
    """How many gradients are kept, M."""
    dtype: str = "bfloat16"
    """The dtype in which they are kept, by its name in torch."""

    score: Any = TensorEntries("statistic")

    @property
    def updates_weights(self) -> bool:
        """Whether prune steps call `weight_change`."""
        return False

    def new_statistic(self, weight: torch.Tensor) -> GradientHistory:
        return GradientHistory(weight, self.num_gradients, getattr(torch, self.dtype))

    def observe(self, observations: Sequence[tuple[Any, torch.Tensor, torch.Tensor]]) -> None:
        for history, _, gradient in observations:
            history.observe(gradient)

    @abstractmethod
    def block_columns(self, columns: int, width: int) -> int:
        """Returns the size of the blocks of a row: all have it, but for the last one of a row.

        Args:
            columns: inputs of the whole matrix.
            width: adjacent inputs of a row that one unit of the pattern holds.
        """

    @abstractmethod
    def weight_scores(
        self,
        weight_RPC: torch.Tensor,
        kept_RPC: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        block: int,
        width: int,
    ) -> torch.Tensor:
        """Returns what `score` gets as `statistic`, (R, P, C) float32: the sum over the weights of a unit is the score
        of what it holds of one row.

        Args:
            weight_RPC: any floating dtype; not modified.
            kept_RPC: bool, False for weights that are pruned already.
            gradients: M views (R, P, C), of any floating dtype; not modified.
            block: see `block_columns`.
            width: of units, as for `block_columns`.
        """

    def weight_change(
        self,
        weight_RPC: torch.Tensor,
        before_RPC: torch.Tensor,
        kept_RPC: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        block: int,
    ) -> torch.Tensor:
        """Returns what a prune step adds to the weights that it leaves (R, P, C), float32; 0 for all others.

        Args:
            weight_RPC: the weights before the prune step; not modified.
            before_RPC, kept_RPC: bool, which weights are kept before and after the prune step.
            gradients, block: as for `weight_scores`.
        """
        return torch.zeros(weight_RPC.shape, dtype=torch.float32, device=weight_RPC.device)


CRITERIA = MethodRegistry(
    "criterion",
    Criterion,
    {
        Requires.NOTHING: Criterion,
        Requires.POSITION: Criterion,
        Requires.GRADIENTS: GradientCriterion,
        Requires.GRADIENTS | Requires.GRADIENT_HISTORY: GradientHistoryCriterion,
        Requires.INPUT_NORMS: Criterion,
        Requires.INPUT_VARIANCES: Criterion,
        Requires.BLOCK_INFLUENCES: Criterion,
        Requires.GRAM: UnitCriterion,
    },
)
register_criterion = CRITERIA.register
