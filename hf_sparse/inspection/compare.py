"""Two checkpoints of one model: are the zeros of the first still zero in the second?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..reporting.tables import format_table
from .checkpoint import Checkpoint, StoredTensor, open_checkpoint
from .files import InspectionError
from .layouts import selection
from .tiles import read_tiles, tiles


@dataclass(frozen=True)
class LayerComparison:
    """The zeros of one selected weight in both checkpoints.

    Args:
        name: in the first.
        zeros: in the first.
        kept: how many of those are zero in the second as well.
        new: zeros of the second that are not zero in the first.
        problem: why the two cannot be compared, if they cannot; then `kept` and `new` are 0.
    """

    name: str
    zeros: int
    kept: int
    new: int
    problem: str | None = None

    @property
    def lost(self) -> int:
        """zeros - kept."""
        return self.zeros - self.kept


@dataclass(frozen=True)
class Comparison:
    """Whether fine-tuning kept the zeros. `str` is a table, `to_dict` is what `--compare --json` prints.

    Args:
        first, second: the checkpoints, as they were named.
        selected_by: as in `CheckpointContents`, of the first.
        layers: the selected weights of the first.
        only_in_first, only_in_second: names of tensors.
        prefix: what the names of the second have in front ("+bert.") or lack ("-bert."), beside those of the first.
    """

    first: str
    second: str
    selected_by: str
    layers: tuple[LayerComparison, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    prefix: str = ""

    @property
    def kept_all(self) -> bool:
        """Whether every selected zero of the first is one of the second."""
        return all(layer.lost == 0 for layer in self.layers)

    @property
    def total(self) -> LayerComparison:
        """Over all layers."""
        zeros, kept, new = (sum(getattr(layer, name) for layer in self.layers) for name in ("zeros", "kept", "new"))
        return LayerComparison("selected", zeros, kept, new)

    def __str__(self) -> str:
        rows = [("layer", "problem", "zeros", "still zero", "lost", "new zeros")]
        for layer in (*self.layers, self.total):
            counts = (layer.zeros, layer.kept, layer.lost, layer.new)
            rows.append((layer.name, layer.problem or "", *(f"{count:,}" for count in counts)))
        if not any(layer.problem for layer in self.layers):
            rows = [(row[0], *row[2:]) for row in rows]
        notes = [f"Compared by name, with {self.prefix} in the second."] if self.prefix else []
        for place, names in ((self.first, self.only_in_first), (self.second, self.only_in_second)):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            notes += [f"Only in {place}: {', '.join(names[:5])}{more}."] if names else []
        return "\n".join([format_table(rows, text_columns=len(rows[0]) - 4), "", *notes]).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Everything, the derived figures included."""
        layers = [asdict(layer) | {"lost": layer.lost} for layer in self.layers]
        return {
            "first": self.first,
            "second": self.second,
            "selected_by": self.selected_by,
            "kept_all": self.kept_all,
            "zeros": self.total.zeros,
            "kept": self.total.kept,
            "lost": self.total.lost,
            "new": self.total.new,
            "prefix": self.prefix,
            "layers": layers,
            "only_in_first": list(self.only_in_first),
            "only_in_second": list(self.only_in_second),
        }


def compare_checkpoints(first: str | Path, second: str | Path, revision: str | None = None) -> Comparison:
    """See whether the zeros of `first`, among the weights that pruning selects, are zero in `second`.

    Zeros of a weight that is missing in `second`, of another shape there, or quantised, count as lost. Names may
    differ by a prefix of the model's body, as they do when a task head is added. `revision` is the first's.

    Raises:
        InspectionError: one cannot be read, or they have no name in common.
    """
    one, two = open_checkpoint(first, revision), open_checkpoint(second)
    prefix = _prefix(one, two)
    others = {_renamed(name, prefix): tensor for name, tensor in two.tensors.items()}
    selected = selection(one)
    return Comparison(
        one.place,
        two.place,
        selected.known_by,
        tuple(_compare(tensor, others.get(name)) for name, tensor in one.tensors.items() if name in selected.names),
        tuple(name for name in one.tensors if name not in others),
        tuple(tensor.name for name, tensor in others.items() if name not in one.tensors),
        prefix,
    )


def _prefix(one: Checkpoint, two: Checkpoint) -> str:
    """The prefix ("", "+p." or "-p.") under which most names of the second are names of the first."""
    heads = [{f"{name.partition('.')[0]}." for name in checkpoint.tensors} for checkpoint in (one, two)]
    candidates = ["", *(f"-{head}" for head in sorted(heads[0])), *(f"+{head}" for head in sorted(heads[1]))]
    common = {
        prefix: sum(_renamed(name, prefix) in one.tensors for name in two.tensors) for prefix in candidates
    }  # "" comes first, so it wins a tie
    best = max(common, key=common.__getitem__)
    if not common[best]:
        raise InspectionError(f"{one.place} and {two.place} have no tensor's name in common: they are not one model.")
    return best


def _renamed(name: str, prefix: str) -> str:
    """The name in the first checkpoint of what is called `name` in the second."""
    return prefix[1:] + name if prefix.startswith("-") else name.removeprefix(prefix[1:])


def _compare(one: StoredTensor, two: StoredTensor | None) -> LayerComparison:
    if not one.is_float:
        raise InspectionError(f"{one.name} in {one.file} is {one.dtype}: its zeros cannot be counted.")
    problem = None
    if two is None:
        problem = "missing in the second"
    elif one.shape != two.shape:
        problem = f"{'x'.join(map(str, two.shape))} in the second, not {'x'.join(map(str, one.shape))}"
    elif not two.is_float:
        problem = f"{two.dtype} in the second: its zeros cannot be counted"
    zeros = kept = new = 0
    seconds = read_tiles(two.file, two.name, tiles(two.shape)) if two is not None and problem is None else None
    for _, tile in read_tiles(one.file, one.name, tiles(one.shape)):
        zero = tile == 0
        zeros += int(zero.count_nonzero())
        if seconds is not None:
            _, other = next(seconds)
            also = other == 0
            both = int((zero & also).count_nonzero())
            kept += both
            new += int(also.count_nonzero()) - both
    return LayerComparison(one.name, zeros, kept, new, problem)
