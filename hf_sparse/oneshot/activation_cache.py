"""The outputs of a block for every calibration batch, cached on the device, on the CPU or on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from ..config.oneshot import ACTIVATIONS
from ..files import open_tensors, write_tensors


class ActivationCache:
    """Maps the number of a batch to the output of a module: any structure of tensors and other values.

    Reading an entry returns copies of its tensors, on the device that they came from.

    Args:
        storage: "device" (tensors stay where they are), "cpu", or "disk": a temporary folder (TMPDIR) that is removed
            together with the cache.

    Raises:
        ValueError: `storage` is none of these.

    Example:
        >>> cache = ActivationCache("disk")
        >>> cache[0] = (torch.tensor([1.0]), None)
        >>> cache[0]
        (tensor([1.]), None)
    """

    def __init__(self, storage: str = "cpu"):
        if storage not in ACTIVATIONS:
            raise ValueError(f'activations are kept in "{storage}": it must be {", ".join(ACTIVATIONS)}.')
        self._entries: dict[int, tuple[list[Any], _pytree.TreeSpec, list[torch.device | None]]] = {}
        self._on_cpu = storage == "cpu"
        self._folder = tempfile.TemporaryDirectory(prefix="hf_sparse-") if storage == "disk" else None

    def __setitem__(self, index: int, output: Any) -> None:
        leaves, layout = _pytree.tree_flatten(output)
        devices = [leaf.device if torch.is_tensor(leaf) else None for leaf in leaves]
        if self._on_cpu:
            leaves = [leaf.to("cpu") if torch.is_tensor(leaf) else leaf for leaf in leaves]
        elif self._folder is not None:
            # safetensors refuses tensors that share memory, and a block may return the same tensor twice.
            tensors = {str(number): leaf.clone() for number, leaf in enumerate(leaves) if torch.is_tensor(leaf)}
            write_tensors(_file(self._folder, index), tensors, {})
            leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self._entries[index] = leaves, layout, devices

    def __getitem__(self, index: int) -> Any:
        return self._read(index, *self._entries[index], copy=True)

    def pop(self, index: int) -> Any:
        """Removes the output for a batch from the cache and returns it, without a copy where none is needed."""
        return self._read(index, *self._entries.pop(index), copy=False)

    def _read(
        self, index: int, leaves: list[Any], layout: _pytree.TreeSpec, devices: list[torch.device | None], copy: bool
    ) -> Any:
        if self._folder is not None:
            tensors, _ = open_tensors(_file(self._folder, index))
            leaves = [tensors.get(str(number), leaf) for number, leaf in enumerate(leaves)]
        leaves = [
            leaf if device is None else leaf.to(device, copy=copy)  # a copy, since blocks may write to their inputs
            for leaf, device in zip(leaves, devices, strict=True)
        ]
        return _pytree.tree_unflatten(leaves, layout)


def _file(folder: tempfile.TemporaryDirectory, index: int) -> Path:
    return Path(folder.name) / f"{index}.safetensors"
