"""What a weight is multiplied with: sums over tokens, so that batches and processes merge by adding.

    InputNorms   total_j  = sum over tokens of x_j²
    Gram         total_jk = sum over tokens of x_j·x_k

Both hold `total` (float32) and `count` (tokens): raw sums, which an all-reduce may add in place. Weights that are fed
the same input share one of them.

Shapes: T tokens, I inputs of the weight.
"""

from __future__ import annotations

import torch


# Temporaries of this many elements stay in a core's cache, so each input is read from memory once.
CHUNK = 256 * 1024
# A block of this many columns is worth a product of its own.
BLOCK = 128


class _InputStatistic:
    """Tokens are counted; what is summed up of them is up to the kind."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str):
        self.total = torch.zeros(shape, dtype=torch.float32, device=device)
        self.count = 0

    def observe(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            x: (..., I) inputs of any floating dtype; summed up in float32.
            keep: (...) bool, which tokens count: False for padding, whose values do not matter. All if None.

        Raises:
            ValueError: a token that counts is inf or nan, or too large for its square; or shapes or dtypes do not
                fit. Nothing is added then.
        """
        x_TI = _tokens(x, keep, self.total.shape[-1])
        squares_I = _squares(x_TI)
        if not bool(torch.isfinite(squares_I).all()):
            bad = (~torch.isfinite(squares_I)).nonzero()[:, 0]
            raise ValueError(
                f"inputs must be finite, but {len(bad)} of {len(squares_I)} (input {int(bad[0])} first) hold inf, nan "
                "or values whose squares overflow: run the model in bfloat16 or float32, or look for a broken weight."
            )
        self._add(x_TI, squares_I)
        self.count += len(x_TI)

    def _add(self, x_TI: torch.Tensor, squares_I: torch.Tensor) -> None:
        raise NotImplementedError

    def merge(self, other: _InputStatistic) -> None:
        """Add what `other`, of the same kind and size, has observed.

        Raises:
            ValueError: it is of another kind or size.
        """
        if type(other) is not type(self) or other.total.shape != self.total.shape:
            raise ValueError(f"{_named(self)} cannot be merged with {_named(other)}: they are of different inputs.")
        self.total += other.total.to(self.total.device)
        self.count += other.count


class InputNorms(_InputStatistic):
    """total_j = sum of x_j² over tokens.

    Args:
        columns: I, how many inputs the weight has.
        device: of the sums.

    Example:
        >>> stat = InputNorms(2)
        >>> stat.observe(torch.tensor([[[3.0, 1.0], [4.0, 2.0], [9.0, 9.0]]]), torch.tensor([[True, True, False]]))
        >>> stat.total, stat.count
        (tensor([25.,  5.]), 2)
        >>> stat.norms
        tensor([5.0000, 2.2361])

    Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, section 3.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        super().__init__((columns,), device)

    def _add(self, x_TI, squares_I):
        self.total += squares_I

    @property
    def norms(self) -> torch.Tensor:
        """(I) ‖x_j‖₂ over all tokens."""
        return self.total.sqrt()


class GramMatrix(_InputStatistic):
    """total_jk = sum of x_j·x_k over tokens, in the lower triangle; what is above it has no meaning.

    Args:
        columns: I, how many inputs the weight has.
        device: of the sums.

    Example:
        >>> stat = GramMatrix(2)
        >>> stat.observe(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
        >>> stat.matrix()
        tensor([[10.,  5.],
                [ 5.,  5.]])
        >>> stat.norms
        tensor([3.1623, 2.2361])

    Reference: half the Hessian of a layer's squared error, Frantar & Alistarh, "SparseGPT: Massive Language Models Can
    Be Accurately Pruned in One-Shot", 2023, section 3.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        super().__init__((columns, columns), device)

    def _add(self, x_TI, squares_I):
        _add_products(self.total, x_TI.float(), 0, len(self.total))

    def matrix(self) -> torch.Tensor:
        """(I, I) the sums, symmetric, in memory of its own."""
        lower = self.total.tril()
        return lower + self.total.tril(-1).t()

    @property
    def norms(self) -> torch.Tensor:
        """(I) ‖x_j‖₂ over all tokens: what `InputNorms` has."""
        return self.total.diagonal().sqrt()


def _tokens(x: torch.Tensor, keep: torch.Tensor | None, columns: int) -> torch.Tensor:
    """(T, I) the tokens that count."""
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


def _squares(x_TI: torch.Tensor) -> torch.Tensor:
    """(I) sums of squares, float32."""
    total = torch.zeros(x_TI.shape[1], dtype=torch.float32, device=x_TI.device)
    for part in x_TI.split(max(1, CHUNK // max(1, x_TI.shape[1]))):
        total += part.float().square().sum(0)
    return total


def _add_products(total: torch.Tensor, x_TI: torch.Tensor, start: int, stop: int) -> None:
    """Add xᵀx to a square on the diagonal, halving it: all below its two halves is one product, and nothing above
    them is computed."""
    if stop - start <= BLOCK:
        total[start:stop, start:stop].addmm_(x_TI[:, start:stop].t(), x_TI[:, start:stop])
        return
    middle = (start + stop) // 2
    _add_products(total, x_TI, start, middle)
    _add_products(total, x_TI, middle, stop)
    total[middle:stop, start:middle].addmm_(x_TI[:, middle:stop].t(), x_TI[:, start:middle])


def _named(stat: object) -> str:
    return f"{type(stat).__name__} {tuple(getattr(getattr(stat, 'total', None), 'shape', ()))}"
