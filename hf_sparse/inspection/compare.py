"""Comparison of two checkpoints of a model: size, zeros and metrics of both, and what happened to each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import SHRINK_FILE
from ..numerics import count_zeros
from ..reporting.layer_groups import group_layers, group_rows, is_grouped
from ..reporting.tables import Table, format_sparsity
from ..reporting.tabular import Tabular
from .card_metrics import read_card_metrics
from .checkpoint import Checkpoint, StoredTensor, open_checkpoint
from .roles import select_tensors
from .tiles import read_tiles, tile_regions
from .weight_files import InspectionError


@dataclass(frozen=True)
class LayerComparison:
    """One weight that pruning selects in the first checkpoint, in both checkpoints.

    Args:
        name: in the first checkpoint.
        zeros: number of zeros in the first.
        kept: number of those that are also zero in the second.
        new: number of zeros in the second only.
        changed: number of values that are not zero in either, and differ.
        problem: why the weights cannot be compared, if they cannot. Then `kept`, `new` and `changed` are 0.
    """

    name: str
    zeros: int
    kept: int
    new: int
    changed: int = 0
    problem: str | None = None

    @property
    def lost(self) -> int:
        """The number of zeros in the first that are not zero in the second."""
        return self.zeros - self.kept


@dataclass(frozen=True)
class CheckpointTotals:
    """The totals of one checkpoint.

    Args:
        source: path or repository name.
        selected_by: how its selected weights are known, as in `CheckpointContents`.
        weights: number of its selected weights.
        zeros: number of those that are zero.
        parameters: number of values of all tensors whose zeros can be counted.
        parameter_zeros: number of those that are zero.
        num_bytes: size of its weight files.
        metrics: those of its model card, without the prefix "eval_".
        is_shrunk: whether units or layers were removed from it, so that the numbers of layers may have changed.
    """

    source: str
    selected_by: str
    weights: int
    zeros: int
    parameters: int
    parameter_zeros: int
    num_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_shrunk: bool = False


@dataclass(frozen=True, repr=False)
class CheckpointComparison(Tabular):
    """Two checkpoints, as `compare_checkpoints` returns them. `print` and notebooks show tables of them.

    Args:
        first, second: the totals of each.
        layers: the weights that pruning selects in the first.
        only_in_first, only_in_second: names of tensors that the other does not have.
        prefix: what the names in the second have in addition ("+bert.") or lack ("-bert.") at their beginning.
    """

    first: CheckpointTotals
    second: CheckpointTotals
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
        names = ("zeros", "kept", "new", "changed")
        return LayerComparison("selected", *(sum(getattr(layer, name) for layer in self.layers) for name in names))

    def __repr__(self) -> str:
        counts = f"{self.total.kept:,} of {self.total.zeros:,} zeros kept, {self.total.new:,} new"
        return f"CheckpointComparison({self.first.source}, {self.second.source}, {counts})"

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        return [self._totals_table(), self._layer_table(all_layers), *self._notes()]

    def _totals_table(self) -> Table:
        one, two = self.first, self.second
        rows: list[tuple[str, ...]] = []
        for name, before, after in (
            ("parameters", one.parameters, two.parameters),
            ("zeros", one.parameter_zeros, two.parameter_zeros),
            ("selected weights", one.weights, two.weights),
            ("zeros of these", one.zeros, two.zeros),
        ):
            rows.append((name, f"{before:,}", f"{after:,}", _ratio(before, after)))
        sparsities = (format_sparsity(totals.zeros, totals.weights)[2] for totals in (one, two))
        rows.append(("sparsity of these", *sparsities, ""))
        sizes = (f"{totals.num_bytes / 1e6:,.1f}" for totals in (one, two))
        rows.append(("weight files, MB", *sizes, _ratio(one.num_bytes, two.num_bytes)))
        for name in dict.fromkeys([*one.metrics, *two.metrics]):
            values = (totals.metrics.get(name) for totals in (one, two))
            rows.append((name, *("-" if value is None else f"{value:.4f}" for value in values), ""))
        return Table(("", "first", "second", "second / first"), tuple(rows), 1)

    def _layer_table(self, all_layers: bool | None) -> Table:
        names = [layer.name for layer in self.layers]
        has_problems = any(layer.problem for layer in self.layers)
        header = ("zeros", "still zero", "lost", "new zeros", "changed")
        if not has_problems and is_grouped(names, all_layers):
            kinds = group_rows(group_layers(names)[1], [], lambda indices: _counts([self.layers[i] for i in indices]))
            total = (self.total.name, f"{len(self.layers)}", *_counts(self.layers))
            return Table(("kind", "layers", *header), (*kinds, total), 1, totals=1)
        rows = [(layer.name, layer.problem or "", *_counts([layer])) for layer in (*self.layers, self.total)]
        if has_problems:
            return Table(("layer", "problem", *header), tuple(rows), 2, totals=1)
        return Table(("layer", *header), tuple((name, *counts) for name, _, *counts in rows), 1, totals=1)

    def _notes(self) -> list[str]:
        notes = [f"Compared by name, with {self.prefix} in the second."] if self.prefix else []
        notes += [
            f"{totals.source} was made smaller: layers after a removed one have other numbers, and are not comparable."
            for totals in (self.first, self.second)
            if totals.is_shrunk
        ]
        for source, names in ((self.first.source, self.only_in_first), (self.second.source, self.only_in_second)):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            notes += [f"Only in {source}: {', '.join(names[:5])}{more}."] if names else []
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON values, as `hf-sparse compare --json` prints them."""
        return {
            "first": asdict(self.first),
            "second": asdict(self.second),
            "kept_all": self.kept_all,
            **{name: getattr(self.total, name) for name in ("zeros", "kept", "lost", "new", "changed")},
            "prefix": self.prefix,
            "layers": [asdict(layer) | {"lost": layer.lost} for layer in self.layers],
            "only_in_first": list(self.only_in_first),
            "only_in_second": list(self.only_in_second),
        }


def _counts(layers: Sequence[LayerComparison]) -> tuple[str, ...]:
    counts = ([getattr(layer, name) for layer in layers] for name in ("zeros", "kept", "lost", "new", "changed"))
    return tuple(f"{sum(values):,}" for values in counts)


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.1%}" if before else "-"


def compare_checkpoints(
    first: str | Path, second: str | Path, revision: str | None = None, second_revision: str | None = None
) -> CheckpointComparison:
    """Compares two checkpoints, such as a model before and after pruning, or a pruned model before and after
    fine-tuning.

    Names may differ by the prefix of the model's body, as they do once a task head is added.

    Args:
        first: a .safetensors file, an index, a directory, or the name of a repository on the Hub.
        second: the same of the checkpoint to compare with it.
        revision: branch, tag or commit of the first repository.
        second_revision: of the second.

    Returns:
        The parameters, zeros, file sizes and card metrics of both; and for each weight of `first` that pruning
        selects, how many of its zeros are zero in `second`. Zeros of a weight that is missing there, quantised, or of
        another shape count as lost.

    Raises:
        InspectionError: if a checkpoint cannot be read, or they have no tensor name in common.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.tensor([[0.0, 0.0, 3.0]])}, f"{folder}/pruned.safetensors")
        ...     save_file({"up.weight": torch.tensor([[0.0, 0.1, 2.0]])}, f"{folder}/tuned.safetensors")
        ...     comparison = compare_checkpoints(f"{folder}/pruned.safetensors", f"{folder}/tuned.safetensors")
        >>> comparison.kept_all, comparison.total.kept, comparison.total.lost, comparison.total.changed
        (False, 1, 1, 1)
        >>> comparison.first.zeros, comparison.second.zeros
        (2, 1)
    """
    one, two = open_checkpoint(first, revision), open_checkpoint(second, second_revision)
    prefix = _find_prefix(one, two)
    others = {_name_in_first(name, prefix): tensor for name, tensor in two.tensors.items()}
    selection = select_tensors(one)
    zeros: list[dict[str, int]] = [{}, {}]
    layers = []
    for name in (name for name in one.tensors if name in selection.names):
        layer = _compare(one.tensors[name], others.get(name))
        layers.append(layer)
        zeros[0][name] = layer.zeros
        if layer.problem is None:
            zeros[1][others[name].name] = layer.kept + layer.new
    return CheckpointComparison(
        _totals(one, zeros[0]),
        _totals(two, zeros[1]),
        tuple(layers),
        tuple(name for name in one.tensors if name not in others),
        tuple(tensor.name for name, tensor in others.items() if name not in one.tensors),
        prefix,
    )


def _totals(checkpoint: Checkpoint, counted: Mapping[str, int]) -> CheckpointTotals:
    """Counts the zeros of a checkpoint; those of some tensors have been counted."""
    sizes = {name: tensor.numel for name, tensor in checkpoint.tensors.items() if tensor.is_float}
    zeros = {name: counted.get(name, -1) for name in sizes}
    for name in (name for name, count in zeros.items() if count < 0):
        tensor = checkpoint.tensors[name]
        zeros[name] = sum(count_zeros(tile) for _, tile in read_tiles(tensor.file, name, tile_regions(tensor.shape)))
    selection = select_tensors(checkpoint)
    selected = [name for name in sizes if name in selection.names]
    return CheckpointTotals(
        checkpoint.source,
        selection.selected_by,
        sum(sizes[name] for name in selected),
        sum(zeros[name] for name in selected),
        sum(sizes.values()),
        sum(zeros.values()),
        sum(file.stat().st_size for file in checkpoint.files),
        read_card_metrics(checkpoint.folder),
        (checkpoint.folder / SHRINK_FILE).is_file(),
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
    regions = list(tile_regions(one.shape))
    tiles = read_tiles(one.file, one.name, regions)
    if two is None or problem is not None:
        return LayerComparison(one.name, sum(count_zeros(tile) for _, tile in tiles), 0, 0, 0, problem)
    zeros = kept = new = changed = 0
    for (_, tile), (_, other) in zip(tiles, read_tiles(two.file, two.name, regions), strict=True):
        is_zero, becomes_zero = tile == 0, other == 0
        zeros += int(is_zero.count_nonzero())
        kept += int((is_zero & becomes_zero).count_nonzero())
        new += int((~is_zero & becomes_zero).count_nonzero())
        changed += int((~is_zero & ~becomes_zero & (tile != other)).count_nonzero())
    return LayerComparison(one.name, zeros, kept, new, changed)
