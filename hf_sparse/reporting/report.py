"""The sparsity of a model and of each of its pruned layers, counted in the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import CONFIG_FILE, REPORT_FILE, read_json, write_json
from .layer_groups import group_layers, group_rows, is_grouped, sparsity_figures
from .tables import Table, format_sparsity, without_empty_columns
from .tabular import Tabular


EMPTIED = 0.999
"""Sparsity from which (almost) nothing is left of a layer."""


@dataclass(frozen=True)
class LayerReport:
    """The sparsity of one selected weight.

    Args:
        name: parameter name.
        group: name of its parameter group.
        pattern: text form of the pattern, such as "2:4".
        weights: number of its entries.
        zeros: number of its entries that are exactly zero.
        error: relative squared error of the layer's outputs on the calibration data; None where it was not measured.
    """

    name: str
    group: str
    pattern: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    error: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the layer that are zero, from 0 to 1; 0 if it has none."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def emptied(self) -> bool:
        """Whether less than 0.1% of the weights remain."""
        return self.sparsity >= EMPTIED

    @property
    def note(self) -> str:
        """ "empty" or "almost empty", for tables; "" for all other layers."""
        return ("empty" if self.zeros == self.weights else "almost empty") if self.emptied else ""


def layer_reports(
    groups: Iterable[Any], zeros: Mapping[str, int], errors: Mapping[str, float] | None = None
) -> list[LayerReport]:
    """Returns the report of each layer of some parameter groups.

    Args:
        groups: `ParameterGroup`s or `ResolvedGroup`s.
        zeros: number of zeros by name; layers that are not named are left out.
        errors: relative squared output errors, where measured.
    """
    return [
        LayerReport(
            *(layer.name, group.name, str(group.pattern), layer.shape, layer.numel, zeros[layer.name]),
            (errors or {}).get(layer.name),
        )
        for group in groups
        for layer in group.layers
        if layer.name in zeros
    ]


@dataclass(frozen=True, repr=False)
class SparsityReport(Tabular):
    """The sparsity of the selected weights and of all parameters, counted in the weights themselves, not in the masks.

    `print(report)` and notebooks show a table: a row per layer or, of many layers, per kind of layer and per block.
    `print(report.format(all_layers=True))` shows every layer.

    Args:
        layers: the selected weights.
        parameters: number of entries of all parameters of the model, biases and embeddings included.
        parameter_zeros: number of those that are exactly zero.
        target: sparsity of the selected weights that was requested.

    Example:
        >>> report = SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5)
        >>> report.sparsity, report.parameter_sparsity
        (0.5, 0.4)
        >>> report
        SparsityReport(1 layer, 8 of 16 selected weights are zero: 50.00%)
        >>> print(report)
        layer       shape  pattern  zeros  weights  sparsity
        a.weight    4x4    2:4          8       16    50.00%
        selected                        8       16    50.00%
        parameters                      8       20    40.00%
    """

    layers: tuple[LayerReport, ...]
    parameters: int
    parameter_zeros: int
    target: float = 0.0

    @classmethod
    def from_counts(
        cls,
        groups: Iterable[Any],
        zeros: Mapping[str, int],
        sizes: Mapping[str, int],
        errors: Mapping[str, float] | None = None,
    ) -> SparsityReport:
        """Builds the report of a model from its parameter groups and the counts of its parameters.

        Args:
            groups: the `ParameterGroup`s or `ResolvedGroup`s of the model.
            zeros, sizes: number of zeros and of entries of every parameter of the model, by name.
            errors: relative squared output errors of the selected weights, where measured.
        """
        groups = list(groups)
        layers = layer_reports(groups, zeros, errors)
        requested = sum(group.target * sum(layer.numel for layer in group.layers) for group in groups)
        target = requested / sum(layer.weights for layer in layers)
        return cls(tuple(layers), sum(sizes.values()), sum(zeros.values()), target)

    @property
    def selected(self) -> int:
        """The number of selected weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """The number of selected weights that are zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the selected weights that are zero, from 0 to 1; 0 if none is selected."""
        return self.zeros / self.selected if self.selected else 0.0

    @property
    def parameter_sparsity(self) -> float:
        """Fraction of all parameters that are zero, from 0 to 1."""
        return self.parameter_zeros / self.parameters if self.parameters else 0.0

    @property
    def emptied(self) -> tuple[LayerReport, ...]:
        """The layers of which less than 0.1% of the weights remain."""
        return tuple(layer for layer in self.layers if layer.emptied)

    def __repr__(self) -> str:
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        zeros, weights, sparsity = format_sparsity(self.zeros, self.selected)
        return f"SparsityReport({layers}, {zeros} of {weights} selected weights are zero: {sparsity})"

    @property
    def summary(self) -> str:
        """The sparsities in a sentence, each with its denominator.

        Example:
            >>> SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5).summary
            '50.00% of the 16 selected weights are zero (target 50.00%), 40.00% of all 20 parameters.'
        """
        return (
            f"{self.sparsity:.2%} of the {self.selected:,} selected weights are zero (target {self.target:.2%}), "
            f"{self.parameter_sparsity:.2%} of all {self.parameters:,} parameters."
        )

    @property
    def _emptied_lines(self) -> list[str]:
        return [f"{layer.note.capitalize()}: {layer.name}" for layer in self.emptied]

    def tables(self, all_layers: bool | None = None) -> list[Table | str]:
        names = [layer.name for layer in self.layers]
        shapes = ["x".join(map(str, layer.shape)) for layer in self.layers]
        patterns = [layer.pattern for layer in self.layers]
        totals = [
            ("selected", format_sparsity(self.zeros, self.selected)),
            ("parameters", format_sparsity(self.parameter_zeros, self.parameters)),
        ]
        if is_grouped(names, all_layers):
            blocks, kinds = group_layers(names)
            figures = sparsity_figures(
                [layer.zeros for layer in self.layers], [layer.weights for layer in self.layers]
            )
            rows = group_rows(kinds, [shapes, patterns], figures)
            rows += [(name, "", "", "", *counts, "", "") for name, counts in totals]
            header = ("layers", "zeros", "weights", "sparsity", "lowest", "highest")
            by_kind = Table(("kind", "shape", "pattern", *header), tuple(rows), 3, totals=2)
            by_block = Table(("block", *header), tuple(group_rows(blocks, [], figures)), 1)
            return [by_kind, by_block, self.summary, *self._emptied_lines]
        cells = [("layer", "shape", "pattern", "zeros", "weights", "sparsity", "error", "note")]
        for layer, shape in zip(self.layers, shapes, strict=True):
            error = "" if layer.error is None else f"{layer.error:.4f}"
            counts = format_sparsity(layer.zeros, layer.weights)
            cells.append((layer.name, shape, layer.pattern, *counts, error, layer.note))
        cells += [(name, "", "", *counts, "", "") for name, counts in totals]
        columns, *rows = without_empty_columns(cells)
        return [Table(columns, tuple(rows), 3, totals=2)]

    def to_dict(self) -> dict[str, Any]:
        """Returns all counts and the sparsities computed from them, ready for JSON."""
        layers = [asdict(layer) | {"shape": list(layer.shape), "sparsity": layer.sparsity} for layer in self.layers]
        return {
            "selected_weights": self.selected,
            "selected_zeros": self.zeros,
            "sparsity_of_selected": self.sparsity,
            "target_sparsity": self.target,
            "parameters": self.parameters,
            "parameter_zeros": self.parameter_zeros,
            "sparsity_of_parameters": self.parameter_sparsity,
            "emptied_layers": [layer.name for layer in self.emptied],
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityReport:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a value is missing or of another type.
        """
        totals = _typed(values, {"layers": list, "parameters": int, "parameter_zeros": int, "target_sparsity": float})
        layers = []
        for number, layer in enumerate(totals.pop("layers")):
            kinds = {"name": str, "group": str, "pattern": str, "weights": int, "zeros": int, "shape": list}
            given = _typed(layer, kinds, f"layers[{number}].")
            error = layer.get("error")
            if not all(_has_type(size, int) for size in given["shape"]) or not (
                error is None or _has_type(error, float)
            ):
                raise ValueError(f"layers[{number}] has a shape or an error that is not a number")
            layers.append(LayerReport(**given | {"shape": tuple(given["shape"])}, error=error))
        return cls(tuple(layers), totals["parameters"], totals["parameter_zeros"], totals["target_sparsity"])

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> SparsityReport:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is damaged.
        """
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path} is not a report of hf_sparse, or is damaged: {error}. Remove it.") from error


def _typed(values: Any, kinds: Mapping[str, type], where: str = "") -> dict[str, Any]:
    """Returns the values of these names, checked for their types."""
    for name, kind in kinds.items():
        if not isinstance(values, Mapping) or not _has_type(values.get(name), kind):
            raise ValueError(f"{where}{name} is missing or no {kind.__name__}")
    return {name: values[name] for name in kinds}


def _has_type(value: Any, kind: type) -> bool:
    """Whether a value of JSON has a type. Whole numbers count things, and are not negative."""
    if kind is int:
        return type(value) is int and value >= 0
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def write_report_and_config(directory: str | Path, report: SparsityReport, config: Mapping[str, Any]) -> None:
    """Writes `pruning_report.json` and `pruning_config.json` beside the weights.

    `config` are the options of pruning, as `PruningConfig.to_dict` or `OneshotConfig.to_dict` returns them.
    """
    report.save(Path(directory) / REPORT_FILE)
    write_json(Path(directory) / CONFIG_FILE, config)
