"""SparsityReport: how much is zero, out of what, layer by layer. Counted in the weights, not in the masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from .tables import figures, table


@dataclass(frozen=True)
class LayerReport:
    """One selected weight: `zeros` of its `weights` are exactly zero. `error` is the relative squared error of its
    outputs on calibration data, where one-shot pruning has measured it."""

    name: str
    group: str
    pattern: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    error: float | None = None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """The selected weights, and beside them all parameters of the model, so that every share names its denominator.

    Args:
        layers: the selected weights.
        parameters: the number of all the model's parameters, biases and embeddings included.
        parameter_zeros: how many of those are exactly zero.
        target: the share of the selected weights that the last prune step asked for.

    Example:
        >>> report = SparsityReport((LayerReport("a.weight", "weights", "2:4", (4, 4), 16, 8),), 20, 8, 0.5)
        >>> report.sparsity, report.parameter_sparsity
        (0.5, 0.4)
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

    @property
    def selected(self) -> int:
        """The number of selected weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """How many of the selected weights are zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """zeros / selected weights."""
        return self.zeros / self.selected if self.selected else 0.0

    @property
    def parameter_sparsity(self) -> float:
        """zeros of all parameters / all parameters."""
        return self.parameter_zeros / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        measured = any(layer.error is not None for layer in self.layers)
        rows = [("layer", "shape", "pattern", "zeros", "weights", "sparsity", *(["error"] if measured else []))]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            error = ["" if layer.error is None else f"{layer.error:.4f}"] if measured else []
            rows.append((layer.name, shape, layer.pattern, *figures(layer.zeros, layer.weights), *error))
        rest = [""] if measured else []
        rows.append(("selected", "", "", *figures(self.zeros, self.selected), *rest))
        rows.append(("parameters", "", "", *figures(self.parameter_zeros, self.parameters), *rest))
        return table(rows, left=3)

    def to_dict(self) -> dict[str, Any]:
        """Everything, the derived figures included."""
        layers = [asdict(layer) | {"shape": list(layer.shape), "sparsity": layer.sparsity} for layer in self.layers]
        return {
            "selected_weights": self.selected,
            "selected_zeros": self.zeros,
            "sparsity_of_selected": self.sparsity,
            "target_sparsity": self.target,
            "parameters": self.parameters,
            "parameter_zeros": self.parameter_zeros,
            "sparsity_of_parameters": self.parameter_sparsity,
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityReport:
        """The inverse of `to_dict`."""
        names = ("name", "group", "pattern", "weights", "zeros")
        layers = (
            LayerReport(**{name: layer[name] for name in names}, shape=tuple(layer["shape"]), error=layer.get("error"))
            for layer in values["layers"]
        )
        return cls(tuple(layers), values["parameters"], values["parameter_zeros"], values["target_sparsity"])

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> SparsityReport:
        """The inverse of `save`."""
        return cls.from_dict(read_json(path))
