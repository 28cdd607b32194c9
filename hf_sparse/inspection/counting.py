"""Counts the zeros of a checkpoint and their structure, tile by tile."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from ..model.layers import LAYOUTS
from .checkpoint import StoredTensor, open_checkpoint
from .contents import CheckpointContents, TensorContents
from .roles import guess_kinds, select_tensors, tied_names
from .structure import StructureScan
from .tiles import read_tiles, tile_regions
from .verification import report_differences


def inspect_checkpoint(source: str | Path, revision: str | None = None) -> CheckpointContents:
    """Counts the zeros of a checkpoint and detects their structure, without building its model.

    Needs memory for a few times 2**21 values, whatever the size of the checkpoint.

    Args:
        source: a .safetensors file, an index, a directory, or the name of a repository on the Hub.
        revision: branch, tag or commit of the repository.

    Returns:
        The zeros and structure of each tensor and in sum, equal and tied tensors, and where the weights disagree with
        a pruning_report.json beside them.

    Raises:
        InspectionError: if the checkpoint cannot be found or read.

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
    checkpoint = open_checkpoint(source, revision)
    selection = select_tensors(checkpoint)
    kinds = guess_kinds(checkpoint.tensors)
    contents: list[TensorContents] = []
    names_by_values: dict[tuple, list[str]] = defaultdict(list)
    not_counted: dict[str, tuple[int, int]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.is_float:
            counts, digest = _count(tensor, kinds[tensor.name], tensor.name in selection.names)
            contents.append(counts)
            if digest is not None:
                names_by_values[tensor.dtype, tensor.shape, digest].append(tensor.name)
        else:
            num_tensors, num_values = not_counted.get(tensor.dtype, (0, 0))
            not_counted[tensor.dtype] = num_tensors + 1, num_values + tensor.numel
    return CheckpointContents(
        source=checkpoint.source,
        files=checkpoint.files,
        selected_by=selection.selected_by,
        tensors=tuple(contents),
        not_counted=dict(sorted(not_counted.items())),
        duplicates=tuple(tuple(names) for names in names_by_values.values() if len(names) > 1),
        tied=tied_names(checkpoint),
        quantised_by=(checkpoint.config.get("quantization_config") or {}).get("quant_method"),
        report=checkpoint.report,
        differences=tuple(report_differences(checkpoint.report, contents, selection)),
    )


def _count(tensor: StoredTensor, kinds: Sequence[str], selected: bool) -> tuple[TensorContents, bytes | None]:
    """Returns the counts of a tensor, and a digest of its values unless all are the same number."""
    layouts = [LAYOUTS[kind] for kind in kinds]
    scans = [
        StructureScan(kind, layout.num_matrices(tensor.shape), *layout.matrix_shape(tensor.shape))
        for kind, layout in zip(kinds, layouts, strict=True)
    ]
    matrix_dims = (layouts[0].row_dim, layouts[0].column_dim) if layouts else ()
    zeros = negative_zeros = 0
    digest = hashlib.sha256()
    constant: torch.Tensor | None = None  # the value of all entries so far; nan, which nothing equals, if they differ
    for region, tile in read_tiles(tensor.file, tensor.name, tile_regions(tensor.shape, matrix_dims)):
        nonzero = tile != 0
        zeros += nonzero.numel() - int(nonzero.count_nonzero())
        negative_zeros += int((torch.signbit(tile) & ~nonzero).count_nonzero())
        digest.update(tile.contiguous().view(-1).view(torch.uint8).numpy().data)
        first = tile.flatten()[0] if constant is None else constant
        constant = first if (tile == first).all() else torch.tensor(torch.nan)
        for scan in scans:
            _add_tile(scan, nonzero, region.start)
    counts = selected, tensor.numel, zeros, negative_zeros, tuple(scan.structure for scan in scans)
    is_varied = constant is not None and bool(constant.isnan())
    return TensorContents(tensor.name, tensor.dtype, tensor.shape, *counts), digest.digest() if is_varied else None


def _add_tile(scan: StructureScan, nonzero: torch.Tensor, start: tuple[int, ...]) -> None:
    layout = LAYOUTS[scan.kind]
    first_matrix = 0 if layout.expert_dim is None else start[layout.expert_dim]
    for index, matrix_RPC in enumerate(layout.matrices(nonzero)):
        tile_RPC = matrix_RPC.contiguous().numpy()
        scan.add(tile_RPC, first_matrix + index, start[layout.row_dim], start[layout.column_dim])
