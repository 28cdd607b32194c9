"""Coupled units: FFN neurons, attention heads and whole layers, slices of several parameters that are pruned together.

Where the units are in a model is found by `model.coupling`; patterns say how many of them may be pruned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch

from .base import Pattern, register_pattern


class CoupledPattern(Pattern):
    """Base class of patterns whose units are slices of several parameters. They have no shape in a single matrix."""

    has_rows = False
    oneshot_criterion = "fluctuation"
    oneshot_solver = "lstsq"
    unit_name: ClassVar[str]
    """What the units are, for people, in the plural."""

    def count(self, pruned: float, units: int) -> int:
        """Returns how many of `units` units to prune where the sparsity asks for `pruned`, a real number. Some unit is
        kept, unless it asks for all."""
        return units if pruned >= units else min(round(pruned), units - 1)

    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> NoReturn:
        raise TypeError(f'units of pattern "{self}" are slices of several parameters, not parts of one matrix')

    def pool(self, scores_RPC: torch.Tensor) -> NoReturn:
        raise TypeError(f'units of pattern "{self}" are slices of several parameters, not parts of one matrix')

    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> NoReturn:
        raise TypeError(f'units of pattern "{self}" are slices of several parameters, not parts of one matrix')

    @property
    def deployment_note(self) -> str:
        return (
            f"Whole {self.unit_name} are zero, in all parameters that they are part of. Where the config can express "
            "it, they can be removed to make a smaller dense model; here they are still stored and computed, so size "
            "and speed are those of the dense model."
        )


@register_pattern("neurons")
@dataclass(frozen=True)
class Neuron(CoupledPattern):
    """A unit is one neuron of a feed-forward network: its row of up (and gate) with the biases, its column of down.

    As many neurons are kept as the sparsity asks for, rounded to a multiple of `multiple_of`, because kernels are slow
    for other widths. "neuron:1" keeps any number.

    Args:
        multiple_of: what the number of kept neurons is a multiple of.

    Example:
        >>> Neuron().count(pruned=461, units=1536), Neuron(1).count(pruned=461, units=1536)
        (464, 461)

    Reference: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, section 3.1.
    """

    multiple_of: int = 8

    syntax = r"neuron(?::(\d+))?"
    example = "neuron"
    coupled_kind = "neuron"
    unit_name = "neurons of feed-forward networks"

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError(
                f'`pattern` "{self}" keeps a multiple of {self.multiple_of} neurons: it must be at least 1.'
            )

    def __str__(self) -> str:
        return self.example if self == Neuron() else f"{self.example}:{self.multiple_of}"

    def count(self, pruned: float, units: int) -> int:
        if pruned >= units:
            return units
        multiples = math.floor((units - round(pruned)) / self.multiple_of + 0.5)
        return units - min(max(1, multiples) * self.multiple_of, units)


@register_pattern("heads")
@dataclass(frozen=True)
class Head(CoupledPattern):
    """A unit is one attention head: its rows of the query, key and value projections with their biases, its columns of
    the output projection; with grouped queries, a key-value head and all query heads that share it.

    Example:
        >>> Head().count(pruned=5.8, units=12)
        6

    Reference: Michel et al., "Are Sixteen Heads Really Better than One?", 2019.
    """

    syntax = "head"
    example = "head"
    coupled_kind = "head"
    unit_name = "attention heads"


@register_pattern("layers")
@dataclass(frozen=True)
class Layer(CoupledPattern):
    """A unit is one transformer layer: all that it adds to the residual stream, so that zeros make it the identity.

    Example:
        >>> Layer().count(pruned=2.6, units=3), Layer().count(pruned=3, units=3)
        (2, 3)

    Reference: Sajjad et al., "On the Effect of Dropping Layers of Pre-trained Transformer Models", 2023.
    """

    syntax = "layer"
    example = "layer"
    coupled_kind = "layer"
    has_layers = False
    oneshot_criterion = "block_influence"
    oneshot_solver = "none"
    unit_name = "layers"
