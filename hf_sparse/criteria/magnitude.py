"""Weight magnitude."""

from dataclasses import dataclass

from .base import Criterion, TensorEntries, register_criterion


@register_criterion("magnitude")
@dataclass(frozen=True)
class Magnitude(Criterion):
    """|w|.

    Example:
        >>> import torch
        >>> Magnitude().score(torch.tensor([0.5, -2.0, 0.0]), None)
        tensor([0.5000, 2.0000, 0.0000])

    Reference: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """

    score = TensorEntries("weight", magnitude=True)
