"""What a method needs to be computed before it can decide."""

from __future__ import annotations

import enum


class Requires(enum.Flag):
    """What a criterion, an allocation or a solver needs beside the weights.

    Each method declares its requirements in `requires`; those of a parameter group are the union over its members
    (`ResolvedGroup.requires`). Whatever runs the methods asks only for these flags, never for a method's name.

    Example:
        >>> needed = Requires.GRADIENTS | Requires.INPUT_NORMS
        >>> bool(needed & Requires.INPUTS), bool(needed & Requires.GRAM)
        (True, False)
    """

    NOTHING = 0
    POSITION = enum.auto()
    """The position of each weight: int64, unique over all layers."""
    GRADIENTS = enum.auto()
    """Sums of a function of weights and gradients over optimizer steps or calibration batches."""
    GRADIENT_HISTORY = enum.auto()
    """With `GRADIENTS`: the last gradients themselves, and not a sum."""
    INPUT_NORMS = enum.auto()
    """The L2 norm of each input feature over all calibration tokens."""
    INPUT_VARIANCES = enum.auto()
    """The variance of each input feature over all calibration tokens, weighted by 1/‖y‖² with the layer's output y."""
    GRAM = enum.auto()
    """The Gram matrix X^T X of the inputs over all calibration tokens."""
    BLOCK_INFLUENCES = enum.auto()
    """How much each block changes the direction of its input, over all calibration tokens."""
    DENSE_NORMS = enum.auto()
    """As `INPUT_NORMS`, of the inputs in the dense model, before anything is pruned."""
    DENSE_GRAM = enum.auto()
    """As `GRAM`, of the inputs in the dense model, before anything is pruned."""
    OUTPUT_GRADIENTS = enum.auto()
    """The mean square of the gradient of the log-likelihood with respect to an output of the layer, in the dense
    model."""
    DENSE_INPUTS = DENSE_NORMS | DENSE_GRAM
    """The inputs in the dense model, from which an allocation measures each layer."""
    INPUTS = INPUT_NORMS | INPUT_VARIANCES | GRAM | BLOCK_INFLUENCES | DENSE_INPUTS
    """Anything that only a calibration pass over the inputs of the weights provides."""
    CALIBRATION_DATA = INPUTS | GRADIENTS
    """Anything that one-shot pruning computes from calibration data."""
