"""Base class of algorithms that train under the constraint that the weights have the zeros of the target."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .base import Algorithm


class ConstrainedTraining(Algorithm):
    """min loss(x) such that x is in S, the weights with the zeros of the pattern at the scheduled sparsity, by ADMM.

    z is a point of S and u the scaled dual variable of the constraint x = z. Each optimizer step on the loss is
    followed by one on strength / 2 ‖x - z + u‖^2, and each prune step of the schedule selects the zeros of z anew, as
    those of the projection of x + u on S, whose units with the lowest scores are zero:

        where z is zero:  x <- x - strength (x + u);  at a prune step  u <- u + x
        elsewhere:        z = x, u = 0

    So weights that z keeps are trained freely. At the last prune step x is projected itself, and training goes on
    without the penalty and with these zeros. `ConstrainedRun` does this on the shards of each rank; subclasses have
    the formulas.

    Example:
        >>> class Nearest(ConstrainedTraining):
        ...     needs_second_moment = False
        ...     def strength_at(self, fraction):
        ...         return 0.1 * fraction
        ...     def scores(self, point, second_moment):
        ...         return point.square()
        >>> Nearest().scores(torch.tensor([1.0, -2.0]), None)
        tensor([1., 4.])
    """

    uses_criterion = False
    reads_gradients = True
    default_scope = "global"

    @abstractmethod
    def strength_at(self, fraction: float) -> float:
        """Returns the strength of the penalty after this fraction, above 0 and below 1, of the prune steps: above 0
        and up to 1, which moves x to z - u in one step."""

    @property
    def needs_second_moment(self) -> bool:
        """Whether scores depend on the second moment, which the optimizer must hold then."""
        return True

    @abstractmethod
    def scores(self, point: torch.Tensor, second_moment: torch.Tensor | None) -> torch.Tensor:
        """Returns the importance scores by which a point is projected; higher is kept.

        Args:
            point: float32; not modified.
            second_moment: float32 of the same shape, the running mean of squared gradients that the optimizer holds;
                not modified. None unless `needs_second_moment`.

        Returns:
            A new tensor of the same shape: float32, finite where the arguments are.
        """
