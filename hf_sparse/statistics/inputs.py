"""Sums over the tokens that a weight is multiplied with during calibration.

    InputNorms   total_j  = sum over tokens of x_j^2
    GramMatrix   total_jk = sum over tokens of x_j * x_k

Weights with the same input share one statistic. Ranks combine theirs with an all-reduce of `total`, in place, and the
sum of `count`.

Shapes: T tokens, I inputs of the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..numerics import ACCELERATOR_CHUNK


# Elements whose temporaries stay in a CPU core's cache. The order of summation, and so the rounding, depends on it.
_CHUNK = 256 * 1024
# Columns of a diagonal block of the Gram matrix that is computed whole, both triangles: smaller products are slower.
_DIAGONAL_BLOCK = 128
_ACCELERATOR_DIAGONAL_BLOCK = 2048
# Whether torch multiplies half-precision matrices into a float32 one on CUDA (2.8 and newer). Products of two such
# numbers are exact in float32, so that nothing is lost against converting them first, which is ten times slower.
_HAS_MIXED_PRODUCT = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()


class _InputStatistic(ABC):
    """A sum over tokens.

    Attributes:
        total: the sum, float32.
        count: number of tokens in it.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str):
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)
        self.count = 0

    def observe(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Adds the tokens of one batch.

        Args:
            x: (..., I) inputs of any floating dtype.
            keep: (...) bool, False for tokens to leave out, such as padding, whose values do not matter. None to keep
                all.

        Raises:
            ValueError: a kept token is not finite, or its square overflows; or shapes or dtypes do not fit. Nothing is
                added then. Values on an accelerator are not checked, as reading the result would wait for it: call
                `check` after the last batch.
        """
        x_TI = _kept_tokens(x, keep, self.total.shape[-1])
        if not len(x_TI):
            return
        squares_I = None
        if x_TI.device.type == "cpu":
            squares_I = _sum_of_squares(x_TI)
            _check_finite(squares_I)
        self._add(x_TI, squares_I)
        self.count += len(x_TI)

    def check(self) -> None:
        """Checks all tokens so far.

        Raises:
            ValueError: as `observe`.
        """
        _check_finite(self.squares)

    @property
    @abstractmethod
    def squares(self) -> torch.Tensor:
        """(I) the sum of squares of each input over all tokens."""

    @property
    def norms(self) -> torch.Tensor:
        """(I) the L2 norm of each input over all tokens."""
        return self.squares.sqrt()

    @abstractmethod
    def set_equal_squares(self, level: float) -> None:
        """Replaces the sums by those of independent inputs, each with the sum of squares `level`."""

    @abstractmethod
    def _add(self, x_TI: torch.Tensor, squares_I: torch.Tensor | None) -> None:
        """Adds tokens to `total`; `squares_I` are their sums of squares, if these are known."""


class InputNorms(_InputStatistic):
    """Squared norms of the inputs: total_j = sum over tokens of x_j^2.

    Args:
        columns: I, the number of inputs of the weight.
        device: of the sums.

    Example:
        >>> statistic = InputNorms(2)
        >>> x = torch.tensor([[[3.0, 1.0], [4.0, 2.0], [9.0, 9.0]]])
        >>> statistic.observe(x, keep=torch.tensor([[True, True, False]]))
        >>> statistic.total, statistic.count
        (tensor([25.,  5.]), 2)
        >>> statistic.norms
        tensor([5.0000, 2.2361])

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, section 3.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        super().__init__((columns,), device)

    def reorder(self, order_I: torch.Tensor) -> None:
        """Puts input `order_I[i]` in place i."""
        self.total = self.total[order_I]

    def set_equal_squares(self, level: float) -> None:
        self.total.fill_(level)
        self.count = len(self.total)

    def _add(self, x_TI: torch.Tensor, squares_I: torch.Tensor | None) -> None:
        self.total += _sum_of_squares(x_TI) if squares_I is None else squares_I

    @property
    def squares(self) -> torch.Tensor:
        return self.total


class GramMatrix(_InputStatistic):
    """The Gram matrix of the inputs: total_jk = sum over tokens of x_j * x_k.

    Only the lower triangle of `total` is defined; see `matrix` for all of it. The matrix is half the Hessian of the
    layer's squared reconstruction error.

    Args:
        columns: I, the number of inputs of the weight.
        device: of the sums.

    Example:
        >>> statistic = GramMatrix(2)
        >>> statistic.observe(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
        >>> statistic.matrix()
        tensor([[10.,  5.],
                [ 5.,  5.]])
        >>> statistic.norms
        tensor([3.1623, 2.2361])

    Reference: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023,
    section 3.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        super().__init__((columns, columns), device)

    def reorder(self, order_I: torch.Tensor) -> None:
        """Puts input `order_I[i]` in place i."""
        self.total = self.matrix()[order_I[:, None], order_I]

    def set_equal_squares(self, level: float) -> None:
        self.total.zero_().fill_diagonal_(level)
        self.count = len(self.total)

    def _add(self, x_TI: torch.Tensor, squares_I: torch.Tensor | None) -> None:
        if not (x_TI.is_cuda and x_TI.dtype in (torch.bfloat16, torch.float16) and _HAS_MIXED_PRODUCT):
            x_TI = x_TI.float()
        smallest = _DIAGONAL_BLOCK if x_TI.device.type == "cpu" else _ACCELERATOR_DIAGONAL_BLOCK
        _add_lower_gram(self.total, x_TI, 0, len(self.total), smallest)

    def matrix(self) -> torch.Tensor:
        """Returns the full symmetric matrix (I, I), a copy."""
        return self.total.tril() + self.total.tril(-1).t()

    @property
    def squares(self) -> torch.Tensor:
        return self.total.diagonal()


def _kept_tokens(x: torch.Tensor, keep: torch.Tensor | None, columns: int) -> torch.Tensor:
    """Checks x and keep, and returns (T, I)."""
    if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(
            f"inputs must be floating point, of shape (..., {columns}), but are {x.dtype} {tuple(x.shape)}"
        )
    x_TI = x.detach().reshape(-1, columns)
    if keep is None:
        return x_TI
    if keep.dtype != torch.bool or keep.shape != x.shape[:-1]:
        raise ValueError(
            f"keep must be bool, of shape {tuple(x.shape[:-1])}, but is {keep.dtype} {tuple(keep.shape)}: an "
            "attention mask of 0 and 1 needs .bool()"
        )
    return x_TI[keep.reshape(-1).to(x.device)]


def _check_finite(squares_I: torch.Tensor) -> None:
    if not bool(torch.isfinite(squares_I).all()):
        bad = (~torch.isfinite(squares_I)).nonzero()[:, 0]
        raise ValueError(
            f"inputs must be finite, but {len(bad)} of {len(squares_I)} (input {int(bad[0])} first) hold inf, nan "
            "or values whose squares overflow: run the model in bfloat16 or float32, or look for a broken weight."
        )


def _sum_of_squares(x_TI: torch.Tensor) -> torch.Tensor:
    """Returns (I) float32."""
    if x_TI.is_cuda and x_TI.dtype != torch.float64:
        # Reads the tokens once and writes no squares.
        return torch.linalg.vector_norm(x_TI, dim=0, dtype=torch.float32).square_()
    total = torch.zeros(x_TI.shape[1], dtype=torch.float32, device=x_TI.device)
    chunk = _CHUNK if x_TI.device.type == "cpu" else ACCELERATOR_CHUNK
    for part in x_TI.split(max(1, chunk // max(1, x_TI.shape[1]))):
        total += part.float().square().sum(0)
    return total


def _add_lower_gram(total: torch.Tensor, x_TI: torch.Tensor, start: int, stop: int, smallest: int) -> None:
    """Adds x^T x to the diagonal block start:stop of `total`.

    The block is halved recursively down to `smallest`: the quarter below the diagonal is one product, and that above
    is left out.
    """
    if stop - start <= smallest:
        _add_product(total[start:stop, start:stop], x_TI[:, start:stop].t(), x_TI[:, start:stop])
        return
    middle = (start + stop) // 2
    _add_lower_gram(total, x_TI, start, middle, smallest)
    _add_lower_gram(total, x_TI, middle, stop, smallest)
    _add_product(total[middle:stop, start:middle], x_TI[:, middle:stop].t(), x_TI[:, start:middle])


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
