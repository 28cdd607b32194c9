"""Sums over the inputs of a matrix whose columns are pruned whole, each token weighted by the size of its output.

A token x with the output y = W x + b has the weight a = 1 / ‖y‖², so that the squared errors of all tokens are
relative ones. Without the weights, a few tokens with large outputs ([CLS] and [SEP] of BERT, the first token of a
decoder) decide alone. With z = [x, 1]:

    WeightedMoments  total_0j = sum over tokens of a * z_j        total_1j = sum over tokens of a * z_j^2
    WeightedGram     total_jk = sum over tokens of a * z_j * z_k

Shapes: T tokens, I inputs, R outputs of the matrix.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from .inputs import GramMatrix, _InputStatistic, _sum_of_squares


MIN_SQUARED_OUTPUT = 1e-12
"""Squared norms of outputs below this are raised to it, so that a token with no output has a finite weight."""


class WeightedInputs(_InputStatistic):
    """What the weighted sums of one input have in common."""

    def observe_outputs(self, x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Adds the tokens of one batch.

        Args:
            x: (..., I) inputs of any floating dtype.
            y: (..., R) the outputs for them.
            keep: (...) bool, False for tokens to leave out, such as padding. None to keep all.

        Raises:
            ValueError: as `GramMatrix.observe`.
        """
        self.observe(weighted_tokens(x, y), keep)

    @property
    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The sum of the weights of all tokens, a scalar."""

    @property
    @abstractmethod
    def sums(self) -> torch.Tensor:
        """(I) the weighted sum of each input."""

    @property
    def variances(self) -> torch.Tensor:
        """(I) the weighted variance of each input."""
        weight = self.weight.clamp(min=torch.finfo(torch.float32).tiny)
        return (self.squares / weight - (self.sums / weight).square()).clamp(min=0)


class WeightedMoments(WeightedInputs):
    """Weighted sums of the inputs and of their squares.

    Args:
        columns: I, the number of inputs.
        device: of the sums.

    Example:
        >>> statistic = WeightedMoments(2)
        >>> statistic.observe_outputs(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0], [2.0]]))
        >>> statistic.weight, statistic.sums, statistic.squares  # the weights are 1 and 1/4
        (tensor(1.2500), tensor([1.7500, 0.5000]), tensor([3.2500, 1.0000]))
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        super().__init__((2, columns + 1), device)

    def set_equal_squares(self, level: float) -> None:
        self.total.zero_()
        self.total[0, -1] = level
        self.total[1] = level
        self.count = self.total.shape[1]

    def _add(self, x_TI: torch.Tensor, squares_I: torch.Tensor | None) -> None:
        z_TI = x_TI.float()
        self.total[0].addmv_(z_TI.t(), z_TI[:, -1])
        self.total[1] += _sum_of_squares(z_TI) if squares_I is None else squares_I

    @property
    def weight(self) -> torch.Tensor:
        return self.total[1, -1]

    @property
    def sums(self) -> torch.Tensor:
        return self.total[0, :-1]

    @property
    def squares(self) -> torch.Tensor:
        return self.total[1, :-1]


class WeightedGram(WeightedInputs, GramMatrix):
    """The weighted Gram matrix of the inputs and of a constant 1, which stands for the bias.

    Only the lower triangle of `total` is defined.

    Args:
        columns: I, the number of inputs; `total` is (I + 1, I + 1).
        device: of the sums.

    Example:
        >>> statistic = WeightedGram(2)
        >>> statistic.observe_outputs(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0], [2.0]]))
        >>> statistic.matrix()
        tensor([[3.2500, 1.5000, 1.7500],
                [1.5000, 1.0000, 0.5000],
                [1.7500, 0.5000, 1.2500]])
        >>> statistic.variances
        tensor([0.6400, 0.6400])
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        GramMatrix.__init__(self, columns + 1, device)

    @property
    def weight(self) -> torch.Tensor:
        return self.total[-1, -1]

    @property
    def sums(self) -> torch.Tensor:
        return self.total[-1, :-1]

    @property
    def squares(self) -> torch.Tensor:
        return self.total.diagonal()[:-1]

    def without_bias(self) -> GramMatrix:
        """Returns the Gram matrix of the inputs alone, a view."""
        gram = GramMatrix(0, self.total.device)
        gram.total, gram.count = self.total[:-1, :-1], self.count
        return gram

    def matrix_without_bias(self) -> torch.Tensor:
        """Returns the full symmetric matrix (I, I) of the inputs, a copy."""
        return self.matrix()[:-1, :-1]

    def centered_matrix(self) -> torch.Tensor:
        """Returns the full symmetric matrix (I, I) of the inputs less their weighted means, a copy: what is left when
        a bias takes its best value."""
        weight = self.weight.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.addr(self.matrix_without_bias(), self.sums, self.sums / weight, alpha=-1)


def weighted_tokens(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns sqrt(a) * [x, 1] of each token, (..., I + 1), float32.

    Example:
        >>> weighted_tokens(torch.tensor([[3.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([[1.5000, 0.5000]])
    """
    squares = y.detach().float().square().sum(-1, keepdim=True)
    scale = squares.clamp(min=MIN_SQUARED_OUTPUT).rsqrt()
    return torch.cat([x.detach().float() * scale, scale], dim=-1)
