"""What blocks have given for each batch, kept where it does not crowd out the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from ..config.oneshot import ACTIVATIONS
from ..files import open_tensors, write_tensors


class Activations:
    """A list of structures of tensors (what a module returns), one for each batch. What is taken out is a copy.

    Args:
        place: "device", where they were made; "cpu"; or "disk", in a folder for temporary files (TMPDIR) that goes
            with this object.

    Example:
        >>> kept = Activations("disk")
        >>> kept[0] = (torch.tensor([1.0]), None)
        >>> kept[0]
        (tensor([1.]), None)
    """

    def __init__(self, place: str = "cpu"):
        if place not in ACTIVATIONS:
            raise ValueError(f'activations are kept in "{place}": it must be {", ".join(ACTIVATIONS)}.')
        self._place = place
        self._kept: dict[int, tuple] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="hf_sparse-") if place == "disk" else None

    def __setitem__(self, index: int, structure: Any) -> None:
        leaves, layout = _pytree.tree_flatten(structure)
        devices = [leaf.device if torch.is_tensor(leaf) else None for leaf in leaves]
        if self._place == "cpu":
            leaves = [leaf.to("cpu") if torch.is_tensor(leaf) else leaf for leaf in leaves]
        elif self._place == "disk":
            # each in memory of its own, which safetensors asks for: a block may give the same tensor twice
            tensors = {str(number): leaf.clone() for number, leaf in enumerate(leaves) if torch.is_tensor(leaf)}
            write_tensors(self._file(index), tensors, {})
            leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self._kept[index] = leaves, layout, devices

    def __getitem__(self, index: int) -> Any:
        return self._brought(self._kept[index], index, copy=True)

    def pop(self, index: int) -> Any:
        """What is kept for a batch, which is kept no longer."""
        return self._brought(self._kept.pop(index), index, copy=False)

    def _brought(self, kept: tuple, index: int, copy: bool) -> Any:
        """A structure where it was made."""
        leaves, layout, devices = kept
        if self._place == "disk":
            tensors, _ = open_tensors(self._file(index))
            leaves = [
                leaf if device is None else tensors[str(n)] for n, (leaf, device) in enumerate(zip(leaves, devices))
            ]
        leaves = [
            # Blocks may write to what they are given.
            leaf if device is None else leaf.to(device, copy=copy)
            for leaf, device in zip(leaves, devices, strict=True)
        ]
        return _pytree.tree_unflatten(leaves, layout)

    def _file(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.safetensors"
