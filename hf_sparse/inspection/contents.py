"""What a checkpoint holds: how much of each tensor is zero, in which structure, and what is held twice."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model.layers import LAYOUTS
from ..reporting.report import LayerReport, SparsityReport
from ..reporting.tables import format_sparsity, format_table
from .checkpoint import Checkpoint, StoredTensor, open_checkpoint
from .layouts import Selection, layouts, selection, tied_names
from .structure import Scan, Structure, readable_pattern
from .tiles import read_tiles, tiles


# Below this share zeros may be there by chance, and need not have the pattern.
_FEW = 0.01


@dataclass(frozen=True)
class TensorContents:
    """What the values of one tensor of floats are.

    Args:
        name, dtype, shape: as saved.
        selected: whether it counts among the selected weights.
        weights: the number of its values.
        zeros: how many are exactly zero.
        negative_zeros: how many of those are -0.0.
        structures: of its zeros, one for each layout that it may have; () for what is no weight of a layer.
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
        """In the layout in which N:M holds, if it may have several."""
        return max(self.structures, key=lambda structure: len(structure.n_of_m), default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "selected": self.selected,
            "weights": self.weights,
            "zeros": self.zeros,
            "negative_zeros": self.negative_zeros,
            "sparsity": self.sparsity,
            "structure": self.structure.to_dict() if self.structure else None,
        }


@dataclass(frozen=True)
class CheckpointContents:
    """What a checkpoint holds. `str` is a table, `to_dict` is what `hf-sparse report --json` prints.

    Args:
        place: the checkpoint, as it was named.
        files: that hold its weights.
        selected_by: how it is known which weights pruning selects: "report" (pruning_report.json beside the weights
            names them), "config" (pruning_config.json chooses among those that look prunable) or "guess" (all that
            look prunable, by name and shape).
        tensors: those of floats of 16 bits or more.
        not_counted: type -> (tensors, values) of all others: quantised, float8 and whole numbers, whose zeros need
            not be zero weights. They are in no figure.
        quantised_by: the method that config.json names, if it does.
        duplicates: names of tensors of the same type, shape and values, unless all of these are one number.
        tied: name -> the tensor that it shares memory with, for names that the files leave out.
        stored: the report beside the weights.
        differences: where that report and the weights disagree.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.eye(16), "up.bias": torch.ones(16)}, f"{folder}/model.safetensors")
        ...     contents = inspect_checkpoint(folder)
        >>> contents.sparsity, contents.tensors[1].structure.n_of_m
        (0.9375, ('1:16',))
        >>> contents.parameters, contents.parameter_zeros
        (272, 240)
    """

    place: str
    files: tuple[Path, ...]
    selected_by: str
    tensors: tuple[TensorContents, ...]
    not_counted: dict[str, tuple[int, int]]
    duplicates: tuple[tuple[str, ...], ...]
    tied: dict[str, str]
    quantised_by: str | None = None
    stored: SparsityReport | None = None
    differences: tuple[str, ...] = ()

    @property
    def selected(self) -> tuple[TensorContents, ...]:
        """The weights that pruning selects."""
        return tuple(tensor for tensor in self.tensors if tensor.selected)

    @property
    def selected_weights(self) -> int:
        """The number of selected weights."""
        return sum(tensor.weights for tensor in self.selected)

    @property
    def selected_zeros(self) -> int:
        """How many of them are zero."""
        return sum(tensor.zeros for tensor in self.selected)

    @property
    def sparsity(self) -> float:
        """selected zeros / selected weights."""
        return self.selected_zeros / self.selected_weights if self.selected_weights else 0.0

    @property
    def parameters(self) -> int:
        """The number of all values that were counted: parameters, and buffers of floats where a model saves any."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def parameter_zeros(self) -> int:
        """How many of them are zero."""
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def parameter_sparsity(self) -> float:
        """zeros of all parameters / all parameters."""
        return self.parameter_zeros / self.parameters if self.parameters else 0.0

    @property
    def notes(self) -> list[str]:
        """What the table does not say, in sentences."""
        notes = [
            {
                "report": "Selected: the weights that pruning_report.json names.",
                "config": "Selected: what pruning_config.json chooses among the weights that look prunable.",
                "guess": "Selected: a guess by name and shape (no embeddings, no task head), for there is no report.",
            }[self.selected_by]
        ]
        negative = [tensor for tensor in self.selected if tensor.negative_zeros]
        if negative:
            count = sum(tensor.negative_zeros for tensor in negative)
            notes.append(
                f"{count:,} of the selected zeros, in {len(negative)} weights, are -0.0: not written by hf_sparse, "
                "but perhaps by multiplying weights by a mask."
            )
        for dtype, (tensors, values) in self.not_counted.items():
            notes.append(f"Not counted: {tensors} tensor{'s' * (tensors > 1)} of {dtype}, {values:,} values.")
        notes += [f"Quantised by {self.quantised_by}, says config.json."] if self.quantised_by else []
        notes += [f"The same values: {', '.join(names)}." for names in self.duplicates]
        notes += [f"Tied: {name} is {kept}." for name, kept in self.tied.items()]
        return notes + [f"Differs from the report: {difference}" for difference in self.differences]

    def __str__(self) -> str:
        rows = [("layer", "shape", "type", "structure", "zeros", "weights", "sparsity")]
        for tensor in self.tensors:
            if tensor.selected or (tensor.structures and tensor.zeros):
                shape = "x".join(map(str, tensor.shape))
                structure = str(tensor.structure or "")
                name = tensor.name if tensor.selected else f"({tensor.name})"
                rows.append((name, shape, tensor.dtype, structure, *format_sparsity(tensor.zeros, tensor.weights)))
        rows.append(("selected", "", "", "", *format_sparsity(self.selected_zeros, self.selected_weights)))
        rows.append(("parameters", "", "", "", *format_sparsity(self.parameter_zeros, self.parameters)))
        return "\n".join([format_table(rows, text_columns=4), "", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Everything, the derived figures included, with the keys of `SparsityReport.to_dict` for what is the same."""
        return {
            "checkpoint": self.place,
            "files": [file.name for file in self.files],
            "selected_by": self.selected_by,
            "selected_weights": self.selected_weights,
            "selected_zeros": self.selected_zeros,
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


def inspect_checkpoint(place: str | Path, revision: str | None = None) -> CheckpointContents:
    """Count the zeros of a checkpoint and see what they have in common, without building its model.

    Args:
        place: a .safetensors file, an index, a directory, or the name of a repository on the Hub.
        revision: of the repository.

    Raises:
        InspectionError: it cannot be found or read: why, and the remedy.

    Memory: a few times 2**21 values, whatever the size of the checkpoint.
    """
    checkpoint = open_checkpoint(place, revision)
    selected = selection(checkpoint)
    kinds = layouts(checkpoint.tensors)
    contents, alike, not_counted = [], defaultdict(list), {}
    for tensor in checkpoint.tensors.values():
        if tensor.is_float:
            found, digest = _contents_of(tensor, kinds[tensor.name], tensor.name in selected.names)
            contents.append(found)
            if digest:
                alike[tensor.dtype, tensor.shape, digest].append(tensor.name)
        else:
            tensors, values = not_counted.get(tensor.dtype, (0, 0))
            not_counted[tensor.dtype] = tensors + 1, values + tensor.numel
    return CheckpointContents(
        place=checkpoint.place,
        files=checkpoint.files,
        selected_by=selected.known_by,
        tensors=tuple(contents),
        not_counted=dict(sorted(not_counted.items())),
        duplicates=tuple(tuple(names) for names in alike.values() if len(names) > 1),
        tied=tied_names(checkpoint),
        quantised_by=(checkpoint.config.get("quantization_config") or {}).get("quant_method"),
        stored=checkpoint.report,
        differences=tuple(_differences(checkpoint, selected, {tensor.name: tensor for tensor in contents})),
    )


def _contents_of(tensor: StoredTensor, kinds: Sequence[str], selected: bool) -> tuple[TensorContents, bytes | None]:
    """What a tensor holds, and a digest of its values unless all are one number."""
    scans = [(kind, _scan(tensor.shape, kind)) for kind in kinds]
    zeros = negative_zeros = 0
    digest, constant = hashlib.sha256(), None
    matrix_dims = (LAYOUTS[kinds[0]].row_dim, LAYOUTS[kinds[0]].column_dim) if kinds else ()
    for box, tile in read_tiles(tensor.file, tensor.name, tiles(tensor.shape, matrix_dims)):
        live = tile != 0
        found = live.numel() - int(live.count_nonzero())
        zeros += found
        if found:
            negative_zeros += int((torch.signbit(tile) & ~live).count_nonzero())
        digest.update(tile.contiguous().view(-1).view(torch.uint8).numpy())
        first = tile.flatten()[0] if constant is None else constant
        constant = first if (tile == first).all() else torch.nan  # which nothing equals
        for kind, scan in scans:
            _add(scan, kind, live, box.start)
    contents = TensorContents(
        tensor.name,
        tensor.dtype,
        tensor.shape,
        selected,
        tensor.numel,
        zeros,
        negative_zeros,
        tuple(scan.result for _, scan in scans),
    )
    varied = constant is not None and constant != constant
    return contents, digest.digest() if varied else None


def _scan(shape: tuple[int, ...], kind: str) -> Scan:
    layout = LAYOUTS[kind]
    return Scan(kind, layout.num_matrices(shape), *layout.matrix_shape(shape))


def _add(scan: Scan, kind: str, live: torch.Tensor, start: tuple[int, ...]) -> None:
    layout = LAYOUTS[kind]
    row, column = start[layout.row_dim], start[layout.column_dim]
    first = 0 if layout.expert_dim is None else start[layout.expert_dim]
    for number, matrix_RPC in enumerate(layout.matrices(live)):
        scan.add(matrix_RPC.contiguous().numpy(), first + number, row, column)


def _differences(checkpoint: Checkpoint, selected: Selection, contents: dict[str, TensorContents]) -> list[str]:
    """Where the report beside the weights and the weights disagree."""
    found, otherwise = [], []
    for layer in checkpoint.report.layers if checkpoint.report else ():
        tensor = contents.get(layer.name)
        if tensor is None and selected.renamed:
            otherwise.append(layer)
        elif tensor is None:
            found.append(f"{layer.name} is not in the files, or its zeros cannot be counted.")
        elif tensor.shape != layer.shape:
            found.append(f"{layer.name} is {tensor.shape}, in the report {layer.shape}.")
        elif tensor.zeros != layer.zeros:
            found.append(f"{layer.name} has {tensor.zeros:,} zeros, in the report {layer.zeros:,}.")
        elif _has_another_structure(tensor, layer):
            found.append(f"{layer.name} does not hold {layer.pattern}, its pattern in the report.")
    counted, reported = sum(contents[name].zeros for name in selected.renamed), sum(layer.zeros for layer in otherwise)
    if counted != reported:
        found.append(
            f"the {len(otherwise)} weights that the report has by other names than the files, such as "
            f"{otherwise[0].name}, have {counted:,} zeros, in the report {reported:,}."
        )
    return found


def _has_another_structure(tensor: TensorContents, layer: LayerReport) -> bool:
    """Whether zeros that should have a pattern do not. Few zeros may be there by chance, and N:M holds at the end."""
    try:
        least = readable_pattern(layer.pattern).implied_sparsity or _FEW
    except ValueError:  # unstructured, or one that a user registered
        return False
    return layer.sparsity >= least and not any(structure.holds(layer.pattern) for structure in tensor.structures)
