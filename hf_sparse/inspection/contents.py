"""The result of an inspection: the zeros of each tensor and their structure, duplicates, tied names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..reporting.layer_groups import group_layers, group_rows, is_grouped, sparsity_figures
from ..reporting.report import EMPTIED, SparsityReport
from ..reporting.tables import Table, format_sparsity
from ..reporting.tabular import Tabular
from .roles import OUTPUT_EMBEDDINGS
from .structure import Structure


_SELECTED_BY = {
    "report": "the weights that pruning_report.json names.",
    "config": "the weights that pruning_config.json selects among those that look prunable.",
    "guess": "guessed by name and shape (no embeddings, pooler or task head), as there is no pruning_report.json.",
}


@dataclass(frozen=True)
class TensorContents:
    """The zeros of one float tensor.

    Args:
        name, dtype, shape: as saved.
        selected: whether pruning selects it.
        weights: number of its values.
        zeros: number of values that are exactly zero.
        negative_zeros: number of those that are -0.0.
        structures: structure of the zeros for each layer kind that the tensor may have; () if it is no layer's weight.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    selected: bool
    weights: int
    zeros: int
    negative_zeros: int
    structures: tuple[Structure, ...] = ()

    @property
    def sparsity(self) -> float:
        """zeros / weights."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def structure(self) -> Structure | None:
        """The structure of the zeros. Among several kinds, that of the kind in which an N:M pattern holds."""
        return max(self.structures, key=lambda structure: len(structure.n_of_m), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as JSON values."""
        structure = self.structure.to_dict() if self.structure else None
        values = vars(self) | {"shape": list(self.shape), "sparsity": self.sparsity, "structure": structure}
        del values["structures"]
        return values


@dataclass(frozen=True, repr=False)
class CheckpointContents(Tabular):
    """The contents of a checkpoint, as `inspect_checkpoint` returns them. `print` and notebooks show a table of them.

    Args:
        source: path or repository name of the checkpoint.
        selected_by: how the selected weights are known: "report" (pruning_report.json beside the weights names them),
            "config" (pruning_config.json selects among the weights that look prunable) or "guess" (all weights that
            look prunable by name and shape).
        tensors: the tensors of floats of 16 bits or more.
        not_counted: type -> (number of tensors, number of values) of all other tensors: quantised, float8 and integer.
            Their zeros need not be zero weights, so no count includes them.
        duplicates: names of tensors with equal types, shapes and values. Constant tensors are left out.
        tied: name that the files leave out -> name of the tensor that it shares memory with.
        quantised_by: the quantisation method in config.json, if any.
        report: the pruning_report.json beside the weights, if any.
        differences: sentences on where that report and the weights disagree.
    """

    source: str
    files: tuple[Path, ...]
    selected_by: str
    tensors: tuple[TensorContents, ...]
    not_counted: dict[str, tuple[int, int]]
    duplicates: tuple[tuple[str, ...], ...]
    tied: dict[str, str]
    quantised_by: str | None = None
    report: SparsityReport | None = None
    differences: tuple[str, ...] = ()

    @property
    def selected(self) -> tuple[TensorContents, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.selected)

    @property
    def selected_weights(self) -> int:
        return sum(tensor.weights for tensor in self.selected)

    @property
    def selected_zeros(self) -> int:
        return sum(tensor.zeros for tensor in self.selected)

    @property
    def sparsity(self) -> float:
        """selected_zeros / selected_weights."""
        return self.selected_zeros / self.selected_weights if self.selected_weights else 0.0

    @property
    def parameters(self) -> int:
        """The number of values of all counted tensors: of parameters, and of float buffers if any are saved."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def parameter_zeros(self) -> int:
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def parameter_sparsity(self) -> float:
        """parameter_zeros / parameters."""
        return self.parameter_zeros / self.parameters if self.parameters else 0.0

    @property
    def notes(self) -> list[str]:
        """Sentences on what the table does not show."""
        notes = [f"Selected: {_SELECTED_BY[self.selected_by]}"]
        negative = [tensor.negative_zeros for tensor in self.selected if tensor.negative_zeros]
        if negative:
            notes.append(
                f"{sum(negative):,} of the selected zeros, in {len(negative)} weights, are -0.0. hf_sparse writes "
                "+0.0, so these may come from a multiplication of weights by a mask."
            )
        emptied = [tensor.name for tensor in self.selected if tensor.zeros >= EMPTIED * tensor.weights > 0]
        if emptied:
            notes.append(
                f"(Almost) empty: less than {1 - EMPTIED:.1%} of the weights remain in {len(emptied)} of "
                f"{len(self.selected)} layers: {', '.join(emptied)}."
            )
        for dtype, (tensors, values) in self.not_counted.items():
            notes.append(f"Not counted: {tensors} tensor{'s' * (tensors > 1)} of {dtype}, {values:,} values.")
        notes += [f"Quantised: config.json names the method {self.quantised_by}."] if self.quantised_by else []
        notes += [f"Equal values: {', '.join(names)}." for names in self.duplicates]
        for name, stored in self.tied.items():
            subject = "the output embeddings share" if name == OUTPUT_EMBEDDINGS else f"{name} shares"
            notes.append(f"Tied: {subject} {stored}.")
        return notes + [f"Differs from the report: {difference}" for difference in self.differences]

    def __repr__(self) -> str:
        zeros, weights, sparsity = format_sparsity(self.selected_zeros, self.selected_weights)
        return f"CheckpointContents({self.source}, {zeros} of {weights} selected weights are zero: {sparsity})"

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        selected, others = self.selected, [tensor for tensor in self._with_zeros if not tensor.selected]
        names = [tensor.name for tensor in selected]
        totals = [
            ("selected", format_sparsity(self.selected_zeros, self.selected_weights)),
            ("parameters", format_sparsity(self.parameter_zeros, self.parameters)),
        ]
        header: tuple[str, ...] = ("shape", "type", "structure")
        labels = [_labels(tensor) for tensor in selected]
        if is_grouped(names, all_layers):
            blocks, kinds = group_layers(names)
            figures = sparsity_figures([tensor.zeros for tensor in selected], [tensor.weights for tensor in selected])
            rows = group_rows(kinds, list(zip(*labels, strict=True)), figures)
            rows += [(name, "", "", "", "", *counts, "", "") for name, counts in totals]
            columns = ("layers", "zeros", "weights", "sparsity", "lowest", "highest")
            by_kind = Table(("kind", *header, *columns), tuple(rows), 4, totals=2)
            by_block = Table(("block", *columns), tuple(group_rows(blocks, [], figures)), 1)
            zeros = sum(tensor.zeros for tensor in others)
            note = [f"Not selected: {len(others)} layers with {zeros:,} zeros."] if others else []
            return [by_kind, by_block, *note, *self.notes]
        rows = []
        for tensor in self._with_zeros:
            name = tensor.name if tensor.selected else f"({tensor.name})"
            rows.append((name, *_labels(tensor), *format_sparsity(tensor.zeros, tensor.weights)))
        rows += [(name, "", "", "", *counts) for name, counts in totals]
        return [Table(("layer", *header, "zeros", "weights", "sparsity"), tuple(rows), 4, totals=2), *self.notes]

    @property
    def _with_zeros(self) -> list[TensorContents]:
        """The selected weights, and other layers that have zeros."""
        return [tensor for tensor in self.tensors if tensor.selected or (tensor.structures and tensor.zeros)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents as JSON values, as `hf-sparse report --json` prints them.

        Counts that `SparsityReport.to_dict` also has are under the same keys.
        """
        return {
            "checkpoint": self.source,
            "files": [file.name for file in self.files],
            **{name: getattr(self, name) for name in ("selected_by", "selected_weights", "selected_zeros")},
            "sparsity_of_selected": self.sparsity,
            "parameters": self.parameters,
            "parameter_zeros": self.parameter_zeros,
            "sparsity_of_parameters": self.parameter_sparsity,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "not_counted": {
                dtype: {"tensors": tensors, "values": values} for dtype, (tensors, values) in self.not_counted.items()
            },
            "quantised_by": self.quantised_by,
            "duplicates": [list(names) for names in self.duplicates],
            "tied": self.tied,
            "differences": list(self.differences),
        }


def _labels(tensor: TensorContents) -> tuple[str, str, str]:
    return "x".join(map(str, tensor.shape)), tensor.dtype, str(tensor.structure or "")
