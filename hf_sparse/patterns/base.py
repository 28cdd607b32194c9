"""Base class of patterns, and their text form ("4x1", "2:4", "channel").

Shapes: R output rows, P kernel positions (1 except for a convolution), C inputs of one matrix, or of a part of it: the
rows of some whole units, with all of P and C. U is the shape of the units of that part.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from ..registry import Registry, nearest


class Pattern(ABC):
    """A pruning granularity: pools scores of weights into scores of units, and expands masks of units to weights.

    Patterns are frozen dataclasses, compared by their fields, of pure tensor code. A subclass is registered with
    `register_pattern` and selected by its text form, or given as an instance.
    """

    syntax: ClassVar[str]
    """Regular expression that matches the whole text form. Its groups are passed to the constructor as integers."""
    example: ClassVar[str]
    """A text form, for error messages."""
    has_rows: ClassVar[bool] = True
    """Whether a row holds several units, so that the units of a row can compete with each other."""
    has_layers: ClassVar[bool] = True
    """Whether a layer holds several units, so that the units of a layer can compete with each other."""
    flat: ClassVar[bool] = False
    """Whether units are single weights without any arrangement."""
    coupled_kind: ClassVar[str | None] = None
    """The kind of `UnitGroup` whose units are pruned, slices of several parameters; None if units are parts of one
    matrix."""

    oneshot_criterion: ClassVar[str] = "wanda"
    """The criterion of one-shot pruning, where the options name neither one nor a solver that selects."""
    oneshot_solver: ClassVar[str] = "none"
    """The solver of one-shot pruning, where the options name none."""

    def __str__(self) -> str:
        """Returns the text form: `example` with this pattern's own numbers."""
        numbers = iter(dataclasses.astuple(self)) if dataclasses.is_dataclass(self) else iter(())
        return re.sub(r"\d+", lambda match: str(next(numbers, match.group())), self.example)

    @property
    def max_sparsity(self) -> float:
        """The largest share of units that may be pruned."""
        return 1.0

    @property
    def unprotected(self) -> Pattern:
        """The pattern of the same units, any of which may be pruned for as long as others have not returned."""
        return self

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(N, M), if units are single weights, and the N highest of every M adjacent inputs are protected."""
        return 0, 1

    @property
    def implied_sparsity(self) -> float | None:
        """The only target that the pattern supports, or None where any target is possible."""
        return None

    @property
    def deployment_note(self) -> str | None:
        """What the zeros mean for the speed and size of a model, in a sentence or more for its card."""
        return None

    def check(self, rows: int, columns: int) -> str | None:
        """Returns why the pattern cannot be applied to a weight with `rows` outputs and `columns` inputs, or None."""
        return None

    def unit_rows(self, rows: int) -> int:
        """Returns the number of output rows that one unit spans, in a weight with `rows` outputs."""
        return 1

    def unit_columns(self, columns: int) -> int:
        """Returns the number of adjacent inputs, of `columns`, that are needed together to score a unit."""
        return columns

    @abstractmethod
    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> tuple[int, ...]:
        """Returns the shape of the units of a part: rows of units first, then the units in each."""

    def num_units(self, shape_RPC: tuple[int, int, int]) -> int:
        """Returns the number of units of a part."""
        return math.prod(self.unit_shape(shape_RPC))

    @abstractmethod
    def pool(self, scores_RPC: torch.Tensor) -> torch.Tensor:
        """Returns the scores of the units of a part: the mean over each unit's weights."""

    def pruned_units(self, kept_RPC: torch.Tensor) -> torch.Tensor:
        """Returns which units of a part have no kept weight, from a mask of its weights (bool)."""
        return self.pool(kept_RPC.float()) == 0

    @abstractmethod
    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> torch.Tensor:
        """Returns a mask that broadcasts to the weights of a part, from the mask of its units."""


class PatternRegistry(Registry):
    """Pattern classes by family name. No text form may belong to two of them."""

    def check(self, name: str, member: Any) -> None:
        """Raises an error when `member` has no text forms, or when they overlap another's."""
        if missing := [attribute for attribute in ("syntax", "example") if not hasattr(member, attribute)]:
            raise TypeError(f'pattern "{name}" must define {", ".join(missing)}.')
        if not re.fullmatch(member.syntax, member.example):
            raise ValueError(
                f'pattern "{name}": its example "{member.example}" must match its syntax "{member.syntax}".'
            )
        for other in (other for other in self.names() if other != name):
            known = self[other]
            for text in (known.example, member.example):
                if re.fullmatch(member.syntax, text) and re.fullmatch(known.syntax, text):
                    raise ValueError(
                        f'pattern "{name}" (syntax "{member.syntax}") also matches "{text}", a form of pattern '
                        f'"{other}": choose a syntax of its own, such as a prefix.'
                    )


PATTERNS = PatternRegistry("pattern", Pattern)
register_pattern = PATTERNS.register


def get_pattern(pattern: str | Pattern) -> Pattern:
    """Returns the pattern that a text form names; an instance is returned as it is.

    Raises:
        ValueError: no pattern, or more than one, has this form; the known forms are listed.

    Example:
        >>> get_pattern("2:4"), str(get_pattern("2:4"))
        (NOfM(keep=2, of=4), '2:4')
        >>> get_pattern("4x1")
        Block(height=4, width=1)
        >>> get_pattern("2;4")
        Traceback (most recent call last):
        ...
        ValueError: unknown pattern "2;4": known are 4x1 (block), channel (channel), channel:in (channel_in), head \
(heads), layer (layers), 2:4 (n_of_m), neuron (neurons), unstructured (unstructured). Did you mean "2:4"?
    """
    if isinstance(pattern, Pattern):
        return pattern
    members = {name: PATTERNS[name] for name in PATTERNS.names()}
    matches = {name: match for name, member in members.items() if (match := re.fullmatch(member.syntax, str(pattern)))}
    if len(matches) > 1:
        raise ValueError(
            f'pattern "{pattern}" is a form of {" and of ".join(matches)}: give an instance of one instead.'
        )
    for name, match in matches.items():
        return members[name](*(int(number) for number in match.groups() if number is not None))
    forms = ", ".join(f"{member.example} ({name})" for name, member in members.items())
    hint = nearest(str(pattern), [member.example for member in members.values()])
    raise ValueError(f'unknown pattern "{pattern}": known are {forms}.{hint}')


def pairwise_sum(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the sum over `dim` by pairwise summation, adding one half to the other.

    The order of additions in `torch.sum` depends on shape and layout, so that the score of a unit could be rounded
    differently in a part of the weight than in the whole.
    """
    while scores.shape[dim] > 1:
        half, odd = divmod(scores.shape[dim], 2)
        last = scores.select(dim, -1)
        scores = scores.narrow(dim, 0, half) + scores.narrow(dim, half, half)
        if odd:
            scores.select(dim, 0).add_(last)
    return scores.squeeze(dim)
