"""Base class of algorithms that learn a mask: the weight of the model is a function of trained tensors.

Shapes: R output rows, P kernel positions (1 except for a convolution) and C inputs of a matrix, or of the part of it
that one rank holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..patterns import Pattern
from .base import Algorithm


Theta = dict[str, torch.Tensor]
"""The trained tensors of a weight by name, each of the weight's shape."""


@dataclass(frozen=True)
class MaskContext:
    """What a learned mask may depend on beside its tensors, for one part of a weight at one optimizer step.

    Args:
        step: the optimizer step whose forward pass computes with the weight, from 1.
        progress: 0 up to the first prune step, 1 at the last, and linear between them.
        sparsity: the scheduled sparsity after the prune steps so far.
        target: the sparsity at the last prune step.
        num_weights: the number of weights that are selected in the run, on all ranks.
        pattern: of the weight.
        noise: noise(i) returns numbers uniform in (0, 1), float32 of the shape of the part. They are a hash of i, the
            seed, the step and the position of each weight, and so the same on any number of ranks.
        totals: the sums of `LearnedMask.totals` over all units that compete, on all ranks: those of the layer, or with
            scope global those of the parameter group; None where there are none.
    """

    step: int
    progress: float
    sparsity: float
    target: float
    num_weights: int
    pattern: Pattern
    noise: Callable[[int], torch.Tensor]
    totals: torch.Tensor | None = None


class LearnedMask(Algorithm):
    """w = f(theta, W): theta are trained tensors of ours, W is the weight without zeros, and the model holds w.

    `LearnedMaskRun` writes w before each forward pass. Before the optimizer steps, it pulls the gradient of w back to
    theta and W by the chain rule of f alone, so that forward passes, state-dict keys and compiled models stay as they
    are. theta has an Adam optimizer of its own. At the last prune step w becomes W with exact zeros, those of the
    lowest `scores`, and theta has served its purpose.

    All methods get parts of a weight (R, P, C), with whole M-groups where the pattern is N:M and `needs_whole_units`.
    Tensors are float32 (float64 for weights in float64), masks are bool. A subclass with theta sets `learning_rate`.

    Example:
        >>> class Signed(LearnedMask):
        ...     def init(self, dense, mask, context):
        ...         return {"scores": dense.clone()}
        ...     def weight(self, theta, dense, mask, context):
        ...         return dense * (mask + theta["scores"] - theta["scores"].detach())
        ...     def scores(self, theta, dense, context):
        ...         return theta["scores"]
        >>> W, mask, g = torch.tensor([1.0, -2.0]), torch.tensor([True, False]), torch.tensor([0.5, 0.5])
        >>> Signed().pull_back({"scores": W.clone()}, W, mask, g, None)
        ({'scores': tensor([ 0.5000, -1.0000])}, tensor([0.5000, 0.0000]))
    """

    reads_gradients = True
    uses_criterion = False
    reads_gradients = True
    can_rewind = False
    trains_weights: ClassVar[bool] = True
    """Whether the trainer's optimizer trains W. If not, the whole model is frozen up to the last prune step."""
    is_soft: ClassVar[bool] = False
    """Whether w has no exact zeros until the last prune step. If not, w is W with the zeros of the mask, which is
    selected anew at each prune step: `weight` then defines the gradients alone."""
    needs_whole_units: ClassVar[bool] = False
    """Whether parts must hold whole units of the pattern: such as M-groups, where f combines the weights of one."""
    starts_from_mask: ClassVar[bool] = False
    """Whether `init` gets a mask at the target sparsity: of the zeros of the checkpoint `prior`, or, without one, of
    the smallest weights."""
    prior: str | None = None
    """The checkpoint, a folder or a Hub name, where `starts_from_mask`."""
    learning_rate: float = 1e-2
    """Of theta. It follows the trainer's schedule: it is multiplied by the factor of its learning rate."""

    @abstractmethod
    def init(self, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> Theta:
        """Returns theta at the start of training: tensors of the part's shape, in memory of their own.

        Args:
            dense: (R, P, C) W; not modified.
            mask: (R, P, C) False where the weight is zero by an earlier mask; see also `starts_from_mask`.
            context: of the first step.
        """

    @abstractmethod
    def weight(self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext) -> torch.Tensor:
        """Returns w = f(theta, W), differentiable in theta and, if `trains_weights`, in W.

        Args:
            theta: of the part.
            dense: (R, P, C) W.
            mask: (R, P, C) the present mask.
            context: of the step.
        """

    def penalty(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> torch.Tensor | None:
        """Returns what is added to the loss for this part, a number that is differentiable like `weight`; None for
        nothing. Parts are summed up: a mean over all weights is a sum divided by `context.num_weights`.

        The gradient is added to the unscaled one, so that it depends on no loss scale and no accumulation.
        """
        return None

    def totals(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> torch.Tensor | None:
        """Returns what this part adds to `context.totals` of the step: a 1-D int64 tensor, so that sums do not depend
        on the order of parts and the number of ranks; None where the algorithm needs none."""
        return None

    @abstractmethod
    def scores(self, theta: Theta, dense: torch.Tensor, context: MaskContext) -> torch.Tensor:
        """Returns the importance scores (R, P, C) from which masks are selected; higher is kept."""

    def early_mask(self, theta: Theta, dense: torch.Tensor, context: MaskContext) -> torch.Tensor | None:
        """Returns the mask (R, P, C) of a prune step other than the last, where the algorithm defines it by itself;
        None to keep the highest scores up to the scheduled sparsity."""
        return None

    def pull_back(
        self,
        theta: Theta,
        dense: torch.Tensor,
        mask: torch.Tensor,
        gradient: torch.Tensor,
        context: MaskContext,
    ) -> tuple[Theta, torch.Tensor | None]:
        """Returns the gradients of loss and penalty with respect to theta, and to W if `trains_weights`, or else None.

        By autograd of `weight` and `penalty`; overridden where a closed form is simpler.

        Args:
            theta, dense, mask, context: as for `weight`; not modified.
            gradient: (R, P, C) of the loss with respect to w; it may be overwritten.
        """
        with torch.enable_grad():
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
            weight = dense.detach().requires_grad_() if self.trains_weights else dense.detach()
            inputs = [*leaves.values(), *([weight] if self.trains_weights else [])]
            outputs: list[torch.Tensor] = [self.weight(leaves, weight, mask, context)]
            seeds: list[torch.Tensor] = [gradient]
            added = self.penalty(leaves, weight, mask, context)
            if added is not None:
                outputs.append(added)
                seeds.append(torch.ones_like(added))
            gradients = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True, materialize_grads=True)
        by_name = dict(zip(leaves, gradients))
        return by_name, gradients[-1] if self.trains_weights else None

    def metrics(
        self, theta: Theta, dense: torch.Tensor, mask: torch.Tensor, context: MaskContext
    ) -> Mapping[str, torch.Tensor]:
        """Returns what is logged with the training loss, by name: numbers (float64) that are summed up over parts."""
        added = self.penalty(theta, dense, mask, context)
        return {} if added is None else {"mask_penalty": added.detach().double()}


def check_learning_rate(learning_rate: float) -> None:
    """Raises a ValueError if the option `learning_rate` is not a positive number."""
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` is {learning_rate}: it must be above 0, as in 1e-2")
