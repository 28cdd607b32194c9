"""Global budget: the next unit to prune adds the same error to the model in every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..requires import Requires
from .base import DenseLayer, LayerSize, MeasuringAllocation, register_allocation, solve_level


BINS_PER_OCTAVE = 4
OCTAVES = 256
"""Marginal errors are counted from 2^-OCTAVES to 2^OCTAVES; those outside in the first and last bin."""


@register_allocation("global")
@dataclass(frozen=True)
class GlobalBudget(MeasuringAllocation):
    """Prunes a unit wherever it adds the least error to the predictions of the model, within each layer's bounds.

    s_l = #{units u of layer l: g_l·e_u < τ} / #units, with one τ for all layers. e_u is the mean of w²·‖x‖² over the
    weights of a unit: the squared error of the layer's outputs when it is pruned, with independent inputs. g_l is the
    mean squared gradient of the log-likelihood with respect to an output of the layer, so that g_l·e_u is the error of
    the model's predictions, to second order. At τ no exchange of units between layers lowers the sum of these errors.
    (Relative errors of the layers' outputs, in place of g_l, do worse than equal sparsities: layers whose outputs
    matter much are often those with small relative errors.)

    Example:
        >>> from hf_sparse.allocations import LayerSize
        >>> def counts(*errors):  # of as many units with these errors
        ...     return count_errors(torch.tensor(errors).log2())
        >>> layers = [
        ...     LayerSize("low", 4, 2, 2, measured=counts(1.0, 2.0, 4.0, 8.0)),
        ...     LayerSize("high", 4, 2, 2, measured=counts(4.0, 8.0, 16.0, 32.0)),
        ... ]
        >>> {name: round(share, 2) for name, share in GlobalBudget().allocate(0.5, layers).items()}
        {'low': 0.75, 'high': 0.25}

    Reference: LeCun et al., "Optimal Brain Damage", 1989, for errors to second order; Martens & Grosse, "Optimizing
    Neural Networks with Kronecker-factored Approximate Curvature", 2015, for inputs and gradients taken apart.
    """

    requires = Requires.DENSE_NORMS | Requires.OUTPUT_GRADIENTS

    def measure(self, layers: Sequence[DenseLayer]) -> list[np.ndarray]:
        """Returns the number of units of each layer in each bin of errors."""
        counts = []
        for layer in layers:
            shift = math.log2(layer.sensitivity) if layer.sensitivity else -math.inf
            pooled = (layer.pattern.pool(score.square_()[:, None]) for score in layer.scores())
            counts.append(np.sum([count_errors(errors.log2() + shift) for errors in pooled], axis=0))
        return counts

    def allocate(self, target: float, layers: Sequence[LayerSize]) -> dict[str, float]:
        counts = np.stack(self.measured(layers)).astype(np.float64)
        below = np.concatenate([np.zeros((len(counts), 1)), counts.cumsum(1)], axis=1) / counts.sum(1, keepdims=True)
        last = counts.shape[1] - 1

        def sparsities(level: float) -> np.ndarray:
            edge = min(int(-level), last)
            return below[:, edge] + (-level - edge) * (below[:, edge + 1] - below[:, edge])

        return solve_level(sparsities, -float(last + 1), 0.0, target, layers)


def count_errors(log2_errors: torch.Tensor) -> np.ndarray:
    """Returns how many of the errors are in each bin.

    Args:
        log2_errors: of any shape.

    Raises:
        ValueError: an error is inf or nan.
    """
    bins = ((log2_errors.flatten() + OCTAVES) * BINS_PER_OCTAVE).clamp(0, 2 * OCTAVES * BINS_PER_OCTAVE - 1)
    if not bool((log2_errors < math.inf).all()):
        raise ValueError("allocation needs finite scores |w|·‖x‖, but some are inf or nan")
    return torch.bincount(bins.long(), minlength=2 * OCTAVES * BINS_PER_OCTAVE).cpu().numpy()
