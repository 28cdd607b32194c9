"""What a pattern is, and how its text form ("4x1", "2:4", "channel") becomes one.

Shapes: R output rows, P kernel positions (1 but for a convolution), C inputs of one matrix, or of a part of it: the
rows of some whole units, with all of P and C. U is the shape of that part's units.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

import torch

from ..registry import Registry, nearest


PATTERNS = Registry("pattern")
"""Pattern classes by family name; each has `syntax`, a regular expression of its text form."""

register_pattern = PATTERNS.register


class Pattern(ABC):
    """Pools the scores of weights into scores of units and spreads a decision about units over their weights.

    Patterns are values: frozen, compared by their fields, pure tensor code.
    """

    syntax: str
    """Regular expression that the whole text form matches; its groups go to the constructor as integers."""
    example: str
    """A text form to show in errors."""
    has_rows: bool = True
    """Whether several units lie in one row, so that the units of a row can compete with each other."""
    flat: bool = False
    """Whether units are single weights in no particular arrangement."""

    @property
    def max_sparsity(self) -> float:
        """The largest share of units that may fall."""
        return 1.0

    @property
    def implied_sparsity(self) -> float | None:
        """The one target that the pattern can have, or None where any will do."""
        return None

    def check(self, rows: int, columns: int) -> str | None:
        """What keeps this pattern from a weight with `rows` outputs and `columns` inputs, or None."""
        return None

    def unit_rows(self, rows: int) -> int:
        """How many output rows one unit spans, in a weight with `rows` outputs."""
        return 1

    def unit_columns(self, columns: int) -> int:
        """How many neighbouring inputs must be seen together to score a unit, of the `columns` that there are."""
        return columns

    @abstractmethod
    def unit_shape(self, shape_RPC: tuple[int, int, int]) -> tuple[int, ...]:
        """The shape of the units of a part: first the rows of units, then the units in each."""

    @abstractmethod
    def pool(self, scores_RPC: torch.Tensor) -> torch.Tensor:
        """Scores of the units of a part: the mean over each unit's weights."""

    def fallen(self, kept_RPC: torch.Tensor) -> torch.Tensor:
        """Which units of a part have no weight left, from which weights are kept (bool)."""
        return self.pool(kept_RPC.float()) == 0

    @abstractmethod
    def expand(self, keep_U: torch.Tensor, shape_RPC: tuple[int, int, int]) -> torch.Tensor:
        """The mask of a part, of a shape that broadcasts to `shape_RPC`'s weights, from the decision about units."""


def get_pattern(text: str) -> Pattern:
    """The pattern that `text` names.

    Raises:
        ValueError: no pattern has this form; the forms are listed.

    Example:
        >>> get_pattern("2:4")
        NOfM(keep=2, of=4)
        >>> get_pattern("4x1")
        Block(height=4, width=1)
        >>> get_pattern("2;4")
        Traceback (most recent call last):
        ...
        ValueError: unknown pattern "2;4": known are 4x1 (block), channel (channel), channel:in (channel_in), \
2:4 (n_of_m), unstructured (unstructured). Did you mean "2:4"?
    """
    members = {name: PATTERNS[name] for name in PATTERNS.names()}
    for member in members.values():
        found = re.fullmatch(member.syntax, str(text))
        if found:
            return member(*(int(number) for number in found.groups()))
    forms = ", ".join(f"{member.example} ({name})" for name, member in members.items())
    hint = nearest(str(text), [member.example for member in members.values()])
    raise ValueError(f'unknown pattern "{text}": known are {forms}.{hint}')


def pairwise_sum(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over `dim`, half added to half. The order in which torch's own sum adds depends on the shape and layout
    of the tensor, so the same unit would round otherwise in a part of the weight than in the whole."""
    while scores.shape[dim] > 1:
        half, odd = divmod(scores.shape[dim], 2)
        last = scores.select(dim, -1)
        scores = scores.narrow(dim, 0, half) + scores.narrow(dim, half, half)
        if odd:
            scores.select(dim, 0).add_(last)
    return scores.squeeze(dim)
