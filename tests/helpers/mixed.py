"""A model with every kind of prunable weight, and pruning by its definition in numpy.

Shapes: O outputs, P kernel positions, I inputs of one matrix.
"""

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(2, 4, 8))


class TransposedExperts(nn.Module):
    is_transposed = True

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(2, 8, 4))


class Mixed(nn.Module):
    """448 weights in five layers. Eighths between -2 and 2: many ties, and means that are exact."""

    def __init__(self, seed=0):
        super().__init__()
        self.linear = nn.Linear(8, 16)
        self.conv1d = Conv1D(12, 8)
        self.conv2d = nn.Conv2d(8, 4, (3, 1))
        self.experts, self.transposed = Experts(), TransposedExperts()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(torch.randint(1, 17, parameter.shape, generator=generator) / 8 * signs)

    def fake_gradients(self, seed):
        """Eighths as well: their products with the weights, and sums of a few of those, are exact."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = (torch.randint(-8, 9, parameter.shape, generator=generator) / 8).to(parameter.dtype)


NAMES = ["linear.weight", "conv1d.weight", "conv2d.weight", "experts.up", "transposed.up"]


def matrices(name, tensor):
    """The (O, P, I) matrices of a weight of `Mixed`, or of its mask."""
    array = np.asarray(tensor.detach().float())
    if name == "conv2d.weight":
        return [array.reshape(4, 8, 3).transpose(0, 2, 1)]
    if name == "conv1d.weight":
        return [array.T[:, None, :]]
    if name == "experts.up":
        return [matrix[:, None, :] for matrix in array]
    if name == "transposed.up":
        return [matrix.T[:, None, :] for matrix in array]
    return [array[:, None, :]]


def pool(pattern, matrix_OPI):
    """Means over the units: (rows of units, units of a row)."""
    outputs, positions, inputs = matrix_OPI.shape
    if pattern == "channel":
        return matrix_OPI.mean((1, 2))[:, None]
    if pattern == "channel:in":
        return matrix_OPI.mean((0, 1))[None]
    high, wide = map(int, pattern.split("x")) if "x" in pattern else (1, 1)
    blocks = matrix_OPI.reshape(outputs // high, high, positions, inputs // wide, wide)
    return blocks.mean((1, 4)).reshape(outputs // high, -1)


def units(pattern, name, tensor):
    """Means over the units of a weight, one array for each of its matrices."""
    return [pool(pattern, matrix) for matrix in matrices(name, tensor)]


def scores(pattern, name, score, mask):
    """The scores of units that compete: -inf for pruned ones, inf for those that N:M protects."""
    found = []
    for matrix, kept in zip(matrices(name, score), matrices(name, mask)):
        if ":" in pattern and pattern[0].isdigit():
            keep, of = map(int, pattern.split(":"))
            alive = np.where(kept > 0, matrix, -np.inf).reshape(-1, of)
            order = np.argsort(alive, axis=1, kind="stable")
            np.put_along_axis(alive, order[:, of - keep :], np.inf, axis=1)
            matrix = alive.reshape(matrix.shape)
        pooled = pool(pattern, matrix)
        found.append(np.where(pool(pattern, kept) == 0, -np.inf, pooled))
    return found


def lowest(scores_U, count):
    """Which are the `count` lowest of a flat array, bool; of equal ones the first."""
    is_lowest = np.zeros(len(scores_U), dtype=bool)
    is_lowest[np.argsort(scores_U, kind="stable")[:count]] = True
    return is_lowest
