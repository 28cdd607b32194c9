"""The triangular factor of a damped Gram matrix, computed once for all weights that share an input."""

from __future__ import annotations

import logging

import torch

from ..statistics import GramMatrix


logger = logging.getLogger(__name__)

DAMPENING = 0.01


def checked_sums(gram: GramMatrix | torch.Tensor, dampening: float) -> torch.Tensor:
    """Returns the sums of a Gram matrix (C, C), of which only the lower triangle is checked and defined.

    Raises:
        ValueError: no token was observed, a sum is inf or nan, the matrix is not square or of another dtype, its
            diagonal is negative, or the dampening is not from 0 to 1.
    """
    if isinstance(gram, GramMatrix) and not gram.count:
        raise ValueError("no token was observed: give calibration data")
    sums = gram.total if isinstance(gram, GramMatrix) else gram.detach()
    if sums.ndim != 2 or sums.shape[0] != sums.shape[1] or sums.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a Gram matrix must be square, in float32 or float64, but is {sums.dtype} {sums.shape}")
    if not 0 <= dampening <= 1:
        raise ValueError(f"`dampening` is {dampening}: it must be from 0 to 1, as in {DAMPENING}")
    if not bool(torch.isfinite(sums.tril().sum())):
        raise ValueError("the Gram matrix must be finite, but holds inf or nan: check the inputs of this weight")
    if bool((sums.diagonal() < 0).any()):
        raise ValueError("the diagonal of a Gram matrix must not be negative, but this one is")
    return sums


class HessianFactor:
    """The upper triangular factor R of a damped Gram matrix: R·R^T = G + d·mean(diag G)·I.

    The inverse that Optimal Brain Surgeon needs is (R·R^T)^-1 = U^T·U, with U = R^-1 upper triangular as well, and a
    diagonal block of U is the inverse of that block of R. One Cholesky factorization, of G with rows and columns in
    reverse order, therefore replaces a factorization, an inversion and another factorization.

    An input feature that is always 0 (a zero on the diagonal) is `dead`: its row and column of R are those of I.

    With fewer tokens than inputs G is rank deficient; the damping then determines the solution in the null space of G,
    where weights are not updated. Where rounding makes the damped matrix indefinite, d is raised tenfold until it is
    positive definite, up to 1, and the value is logged.

    Args:
        gram: the Gram matrix, or a tensor (C, C), float32 or float64, of which the lower triangle is read.
        dampening: d, from 0 to 1; 0 requires a G of full rank.

    Attributes:
        upper_CC: R.
        dead_C: bool, the dead input features.
        dampening: the value of d that was used.

    Raises:
        ValueError: no token was observed, a sum is inf or nan, or G is not positive definite with any damping.

    Example:
        >>> factor = HessianFactor(torch.tensor([[5.0, 2.0], [2.0, 1.0]]), dampening=0)
        >>> factor.upper_CC
        tensor([[1., 2.],
                [0., 1.]])

    Reference: Frantar & Alistarh, "SparseGPT", 2023, sections 3.2-3.3, for the damping and the inverse.
    """

    def __init__(self, gram: GramMatrix | torch.Tensor, dampening: float = DAMPENING):
        sums = checked_sums(gram, dampening)
        # Rows and columns in reverse order, so that the factor's upper triangle becomes the lower one.
        reverse = sums.flip(0, 1).t()
        diagonal = reverse.diagonal().clone()
        dead = diagonal == 0
        self.dead_C = dead.flip(0)
        self.dampening = dampening
        lower = self._cholesky(reverse, diagonal, dead)
        del reverse  # frees as much memory as the next line takes
        self.upper_CC = lower.flip(0, 1)

    def _cholesky(self, reverse: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        mean = diagonal.sum() / (~dead).sum().clamp(min=1)
        while True:
            reverse.diagonal().copy_(torch.where(dead, 1.0, diagonal + self.dampening * mean))
            lower, failed = torch.linalg.cholesky_ex(reverse)
            if not int(failed):
                return lower
            if self.dampening in (0, 1):
                raise ValueError(
                    f"the Gram matrix is not positive definite with `dampening` {self.dampening}: it is rank "
                    f"deficient, as with fewer tokens than its {len(diagonal)} inputs. Use `dampening={DAMPENING}`, "
                    "or more calibration data."
                )
            raised = min(1.0, 10 * self.dampening)
            logger.warning("`dampening` %g leaves a Gram matrix indefinite: raised to %g.", self.dampening, raised)
            self.dampening = raised
