"""Comparison of two checkpoints of a model: whether the zeros of the first are still zero in the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from ..numerics import count_zeros
from ..reporting.layer_groups import group_layers, group_rows, is_grouped
from ..reporting.tables import Table
from ..reporting.tabular import Tabular
from .checkpoint import Checkpoint, StoredTensor, open_checkpoint
from .roles import select_tensors
from .tiles import read_tiles, tile_regions
from .weight_files import InspectionError


@dataclass(frozen=True)
class LayerComparison:
    """The zeros of one selected weight in both checkpoints.

    Args:
        name: in the first checkpoint.
        zeros: number of zeros in the first.
        kept: number of those that are also zero in the second.
        new: number of zeros in the second only.
        problem: why the weights cannot be compared, if they cannot. Then `kept` and `new` are 0.
    """

    name: str
    zeros: int
    kept: int
    new: int
    problem: str | None = None

    @property
    def lost(self) -> int:
        return self.zeros - self.kept


@dataclass(frozen=True, repr=False)
class CheckpointComparison(Tabular):
    """The zeros of two checkpoints, as `compare_checkpoints` returns them. `print` and notebooks show a table of them.

    Args:
        first, second: paths or repository names of the checkpoints.
        selected_by: how the selected weights of the first are known, as in `CheckpointContents`.
        layers: the selected weights of the first.
        only_in_first, only_in_second: names of tensors that the other does not have.
        prefix: what the names in the second have in addition ("+bert.") or lack ("-bert.") at their beginning.
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
        """Whether every zero in the selected weights of the first is zero in the second."""
        return all(layer.lost == 0 for layer in self.layers)

    @property
    def total(self) -> LayerComparison:
        """The sums over all layers."""
        zeros, kept, new = (sum(getattr(layer, name) for layer in self.layers) for name in ("zeros", "kept", "new"))
        return LayerComparison("selected", zeros, kept, new)

    def __repr__(self) -> str:
        counts = f"{self.total.kept:,} of {self.total.zeros:,} zeros kept, {self.total.new:,} new"
        return f"CheckpointComparison({self.first}, {self.second}, {counts})"

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        names = [layer.name for layer in self.layers]
        has_problems = any(layer.problem for layer in self.layers)
        header: tuple[str, ...] = ("zeros", "still zero", "lost", "new zeros")
        if not has_problems and is_grouped(names, all_layers):
            kinds = group_rows(group_layers(names)[1], [], lambda indices: _counts([self.layers[i] for i in indices]))
            total = (self.total.name, f"{len(self.layers)}", *_counts(self.layers))
            table = Table(("kind", "layers", *header), (*kinds, total), 1, totals=1)
        else:
            rows = [(layer.name, layer.problem or "", *_counts([layer])) for layer in (*self.layers, self.total)]
            if has_problems:
                table = Table(("layer", "problem", *header), tuple(rows), 2, totals=1)
            else:
                without = tuple((name, *counts) for name, _, *counts in rows)
                table = Table(("layer", *header), without, 1, totals=1)
        notes = [f"Compared by name, with {self.prefix} in the second."] if self.prefix else []
        for source, only in ((self.first, self.only_in_first), (self.second, self.only_in_second)):
            more = f" and {len(only) - 5} more" if len(only) > 5 else ""
            notes += [f"Only in {source}: {', '.join(only[:5])}{more}."] if only else []
        return [table, *notes]

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON values, as `hf-sparse report --compare --json` prints them."""
        return {
            **{name: getattr(self, name) for name in ("first", "second", "selected_by", "kept_all")},
            **{name: getattr(self.total, name) for name in ("zeros", "kept", "lost", "new")},
            "prefix": self.prefix,
            "layers": [asdict(layer) | {"lost": layer.lost} for layer in self.layers],
            "only_in_first": list(self.only_in_first),
            "only_in_second": list(self.only_in_second),
        }


def _counts(layers: Sequence[LayerComparison]) -> tuple[str, ...]:
    counts = ([getattr(layer, name) for layer in layers] for name in ("zeros", "kept", "lost", "new"))
    return tuple(f"{sum(values):,}" for values in counts)


def compare_checkpoints(first: str | Path, second: str | Path, revision: str | None = None) -> CheckpointComparison:
    """Compares the zeros of two checkpoints, such as a pruned model before and after fine-tuning.

    Names may differ by the prefix of the model's body, as they do once a task head is added.

    Args:
        first: a .safetensors file, an index, a directory, or the name of a repository on the Hub.
        second: the same of the checkpoint to compare with it.
        revision: branch, tag or commit of the first repository.

    Returns:
        For each weight of `first` that pruning selects, how many of its zeros are zero in `second`. Zeros of a weight
        that is missing there, quantised, or of another shape count as lost.

    Raises:
        InspectionError: if a checkpoint cannot be read, or they have no tensor name in common.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.tensor([[0.0, 0.0, 3.0]])}, f"{folder}/pruned.safetensors")
        ...     save_file({"up.weight": torch.tensor([[0.0, 0.1, 2.0]])}, f"{folder}/tuned.safetensors")
        ...     comparison = compare_checkpoints(f"{folder}/pruned.safetensors", f"{folder}/tuned.safetensors")
        >>> comparison.kept_all, comparison.total.kept, comparison.total.lost
        (False, 1, 1)
    """
    one, two = open_checkpoint(first, revision), open_checkpoint(second)
    prefix = _find_prefix(one, two)
    others = {_name_in_first(name, prefix): tensor for name, tensor in two.tensors.items()}
    selection = select_tensors(one)
    return CheckpointComparison(
        one.source,
        two.source,
        selection.selected_by,
        tuple(_compare(tensor, others.get(name)) for name, tensor in one.tensors.items() if name in selection.names),
        tuple(name for name in one.tensors if name not in others),
        tuple(tensor.name for name, tensor in others.items() if name not in one.tensors),
        prefix,
    )


def _find_prefix(one: Checkpoint, two: Checkpoint) -> str:
    """Returns the prefix ("", "+p." or "-p.") under which the checkpoints have most names in common."""
    heads = [{f"{name.partition('.')[0]}." for name in checkpoint.tensors} for checkpoint in (one, two)]
    candidates = ["", *(f"-{head}" for head in sorted(heads[0])), *(f"+{head}" for head in sorted(heads[1]))]

    def num_common(prefix: str) -> int:
        return sum(_name_in_first(name, prefix) in one.tensors for name in two.tensors)

    best = max(candidates, key=num_common)  # of equal numbers the first: "" before all others
    if not num_common(best):
        raise InspectionError(
            f"{one.source} and {two.source} have no tensor name in common: they are not of one model."
        )
    return best


def _name_in_first(name: str, prefix: str) -> str:
    """Returns the name that a tensor of the second checkpoint has in the first."""
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
    tiles = read_tiles(one.file, one.name, tile_regions(one.shape))
    others = (
        repeat((None, torch.tensor(1.0)))  # without zeros
        if two is None or problem is not None
        else read_tiles(two.file, two.name, tile_regions(two.shape))
    )
    zeros = kept = new = 0
    for (_, tile), (_, other) in zip(tiles, others):
        zeros += count_zeros(tile)
        kept += int(((tile == 0) & (other == 0)).count_nonzero())
        new += int(((tile != 0) & (other == 0)).count_nonzero())
    return LayerComparison(one.name, zeros, kept, new, problem)
