"""The factor of a Gram matrix: made once for each distinct input, used for every weight that it feeds."""

from __future__ import annotations

import logging

import torch

from ..statistics import GramMatrix


logger = logging.getLogger(__name__)

DAMPENING = 0.01


class HessianFactor:
    """R upper triangular with R·Rᵀ = G + d·mean(diag G)·I.

    The inverse that Optimal Brain Surgeon needs is (R·Rᵀ)⁻¹ = Uᵀ·U with U = R⁻¹ upper triangular too, and a diagonal
    block of U is the inverse of R's. So one Cholesky factorization, of G with rows and columns in reverse order,
    replaces a factorization, an inversion and another factorization.

    An input that is always 0 (a zero on the diagonal) is `dead`: R has a 1 there and nothing else.

    d is the dampening. With fewer tokens than inputs G is of less than full rank; the dampening then stands for what
    was not seen, and leaves weights alone along it. Where rounding makes even that indefinite, d is raised tenfold
    until it is not (logged), up to 1.

    Args:
        gram: the sums, or their matrix (C, C), float32 or float64, of which the lower triangle is read.
        dampening: d; 0 asks for G itself, which must be of full rank then.

    Raises:
        ValueError: no token was observed, a sum is inf or nan, or G is not positive definite whatever the dampening.

    Example:
        >>> factor = HessianFactor(torch.tensor([[5.0, 2.0], [2.0, 1.0]]), dampening=0)
        >>> factor.upper_CC
        tensor([[1., 2.],
                [0., 1.]])

    Reference: the dampening and the inverse are those of Frantar & Alistarh, "SparseGPT", 2023, sections 3.2-3.3.
    """

    def __init__(self, gram: GramMatrix | torch.Tensor, dampening: float = DAMPENING):
        if isinstance(gram, GramMatrix) and not gram.count:
            raise ValueError("no token was observed, so nothing is known of the inputs: give calibration data")
        sums = gram.total if isinstance(gram, GramMatrix) else gram.detach()
        if sums.ndim != 2 or sums.shape[0] != sums.shape[1] or sums.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a Gram matrix must be square, in float32 or float64, but is {sums.dtype} {sums.shape}")
        if not 0 <= dampening <= 1:
            raise ValueError(f"dampening is {dampening}: it must be from 0 to 1, as in {DAMPENING}")
        # From here on rows and columns are in reverse order, and the upper triangle has become the lower one.
        reverse = sums.flip(0, 1).t()
        if not bool(torch.isfinite(reverse.tril().sum())):
            raise ValueError("the Gram matrix must be finite, but holds inf or nan: look at the inputs of this weight")
        diagonal = reverse.diagonal().clone()
        if bool((diagonal < 0).any()):
            raise ValueError("a Gram matrix has no negative number on its diagonal, but this one has")
        dead = diagonal == 0
        self.dead_C = dead.flip(0)
        self.dampening = dampening
        lower = self._factorized(reverse, diagonal, dead)
        del reverse  # as large as what follows
        self.upper_CC = lower.flip(0, 1)

    def _factorized(self, reverse: torch.Tensor, diagonal: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        mean = diagonal.sum() / (~dead).sum().clamp(min=1)
        while True:
            reverse.diagonal().copy_(torch.where(dead, 1.0, diagonal + self.dampening * mean))
            lower, failed = torch.linalg.cholesky_ex(reverse)
            if not int(failed):
                return lower
            if self.dampening in (0, 1):
                raise ValueError(
                    f"the Gram matrix is not positive definite with dampening {self.dampening}: it is of less than "
                    f"full rank, as with fewer tokens than its {len(diagonal)} inputs. Use dampening={DAMPENING}, or "
                    "more calibration data."
                )
            raised = min(1.0, 10 * self.dampening)
            logger.warning("dampening %g leaves a Gram matrix indefinite: raised to %g.", self.dampening, raised)
            self.dampening = raised
