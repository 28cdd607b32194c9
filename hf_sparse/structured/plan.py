"""What a smaller model of the same class can leave out, and what must stay: decided from zeros alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import SHRINK_FILE, read_json, write_json
from ..reporting.tables import Table
from ..reporting.tabular import Tabular


@dataclass(frozen=True)
class SizeChange:
    """A config field that gets smaller, or a list of blocks that gets shorter.

    Args:
        field: name of the config field.
        before, after: its values.
        detail: what is removed, in words.
    """

    field: str
    before: int
    after: int
    detail: str

    def __str__(self) -> str:
        return f"{self.field} {self.before:,} -> {self.after:,}: {self.detail}"


@dataclass(frozen=True, repr=False)
class ShrinkPlan(Tabular):
    """What `shrink` removes from a model, and what it keeps although it is zero.

    `print(plan)` is a summary, which notebooks show with a table.

    Args:
        model_class: name of the class of the model, which does not change.
        changes: the config fields that get smaller.
        kept: what is zero but stays, each with the reason and, where there is one, the remedy.
        layers: name of each list of blocks from which blocks are removed -> the numbers of those that stay.
        parameters: number of parameters before and after.
        num_bytes: size of the weights before and after, in bytes: that of the file, but for its header.
        heterogeneous: whether layers get sizes that the config cannot express.

    Example:
        >>> change = SizeChange("intermediate_size", 1536, 768, "768 to 1,000 of 1,536 neurons are zero")
        >>> print(ShrinkPlan("BertModel", (change,), (), {}, (22_700_000, 19_100_000), (90_800_000, 76_400_000)))
        BertModel: 22,700,000 -> 19,100,000 parameters (84.1 %), 90.8 -> 76.4 MB
        removed:
          intermediate_size 1,536 -> 768: 768 to 1,000 of 1,536 neurons are zero
    """

    model_class: str
    changes: tuple[SizeChange, ...]
    kept: tuple[str, ...]
    layers: dict[str, tuple[int, ...]]
    parameters: tuple[int, int]
    num_bytes: tuple[int, int]
    heterogeneous: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShrinkPlan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a value is missing or of another type.
        """
        if wrong := [name for name, is_valid in _IS_VALID.items() if not is_valid(values.get(name))]:
            raise ValueError(f"{', '.join(wrong)} cannot be used")
        given: dict[str, Any] = dict(values)
        for name in ("kept", "parameters", "num_bytes"):
            given[name] = tuple(given[name])
        given |= {"changes": tuple(SizeChange(**change) for change in values["changes"])}
        given |= {"layers": {name: tuple(numbers) for name, numbers in given.pop("layers").items()}}
        return cls(**{name: given[name] for name in _IS_VALID})

    def save(self, directory: str | Path) -> None:
        """Writes pruning_shrink.json, which `load` reads, into the folder of the smaller model."""
        write_json(Path(directory) / SHRINK_FILE, self.to_dict())

    @classmethod
    def load(cls, directory: str | Path) -> ShrinkPlan | None:
        """Reads pruning_shrink.json; None if the folder has none.

        Raises:
            ValueError: the file is damaged.
        """
        path = Path(directory) / SHRINK_FILE
        if not path.is_file():
            return None
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}. Remove it.") from error

    def __repr__(self) -> str:
        return f"ShrinkPlan({self._size})"

    @property
    def _size(self) -> str:
        before, after = self.parameters
        megabytes = " -> ".join(f"{num_bytes / 1e6:,.1f}" for num_bytes in self.num_bytes)
        share = f" ({100 * after / before:.1f} %)" if before else ""
        return f"{self.model_class}: {before:,} -> {after:,} parameters{share}, {megabytes} MB"

    def __str__(self) -> str:
        lines = [self._size]
        lines += ["removed:", *(f"  {change}" for change in self.changes)] if self.changes else ["nothing is removed."]
        return "\n".join([*lines, *self._kept_lines])

    @property
    def _kept_lines(self) -> list[str]:
        return ["zero, but kept:", *(f"  {reason}" for reason in self.kept)] if self.kept else []

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        rows = [(change.field, f"{change.before:,}", f"{change.after:,}", change.detail) for change in self.changes]
        table = Table(("removed", "before", "after", "what"), tuple(rows), 4)
        return [self._size, table if rows else "nothing is removed.", *self._kept_lines]


def _is_change(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in fields(SizeChange)}
        and _are_counts([value["before"], value["after"]])
        and isinstance(value["field"], str)
        and isinstance(value["detail"], str)
    )


def _are_counts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) is int and value >= 0 for value in values)


def _are_two_counts(values: Any) -> bool:
    return _are_counts(values) and len(values) == 2


# Whether a value of JSON can be that of each field of `ShrinkPlan`.
_IS_VALID: dict[str, Callable[[Any], bool]] = {
    "model_class": lambda value: isinstance(value, str),
    "changes": lambda values: isinstance(values, (list, tuple)) and all(map(_is_change, values)),
    "kept": lambda values: isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values),
    "layers": lambda value: isinstance(value, dict) and all(map(_are_counts, value.values())),
    "parameters": _are_two_counts,
    "num_bytes": _are_two_counts,
    "heterogeneous": lambda value: isinstance(value, bool),
}
