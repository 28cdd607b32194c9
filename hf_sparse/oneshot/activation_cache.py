"""The outputs of a block for every calibration batch, cached on the device, on the CPU or on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from ..config.oneshot import ACTIVATIONS
from ..files import open_tensors, write_tensors
from .host_memory import HostMemory, LoadedTensor


class ActivationCache:
    """Maps the number of a batch to the output of a module: any structure of tensors and other values.

    Reading an entry returns copies of its tensors, on the device that they came from. Those of a GPU are copied to
    the CPU and back while it computes: an entry is loaded when the one before is read.

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
            raise ValueError(f'`activations` is "{storage}": it must be {" or ".join(ACTIVATIONS)}.')
        self._entries: dict[int, tuple[list[Any], _pytree.TreeSpec, list[torch.device | None]]] = {}
        self._on_cpu = storage == "cpu"
        self._hosts: dict[torch.device, HostMemory] = {}
        self._loading: tuple[int, list[Any]] | None = None
        """The number of the batch that is read next, and its tensors."""
        self._folder = tempfile.TemporaryDirectory(prefix="hf_sparse-") if storage == "disk" else None

    def __setitem__(self, index: int, output: Any) -> None:
        leaves, layout = _pytree.tree_flatten(output)
        devices = [leaf.device if torch.is_tensor(leaf) else None for leaf in leaves]
        if self._on_cpu:
            leaves = [self._store(leaf) if torch.is_tensor(leaf) else leaf for leaf in leaves]
        elif self._folder is not None:
            # safetensors refuses tensors that share memory, and a block may return the same tensor twice.
            tensors = {str(number): leaf.clone() for number, leaf in enumerate(leaves) if torch.is_tensor(leaf)}
            write_tensors(_file(self._folder, index), tensors, {})
            leaves = [None if torch.is_tensor(leaf) else leaf for leaf in leaves]
        self._entries[index] = leaves, layout, devices
        if self._loading is not None and self._loading[0] == index:
            self._loading = None

    def _store(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor.to("cpu")
        if tensor.device not in self._hosts:
            self._hosts[tensor.device] = HostMemory(tensor.device)
        return self._hosts[tensor.device].store(tensor)

    def __getitem__(self, index: int) -> Any:
        return self._read(index, *self._entries[index], copy=True)  # since blocks may write to their inputs

    def pop(self, index: int) -> Any:
        """Removes the output for a batch from the cache and returns it, without a copy where none is needed."""
        return self._read(index, *self._entries.pop(index), copy=False)

    def _load(self, leaves: list[Any], devices: list[torch.device | None]) -> list[Any]:
        """Starts to copy the tensors of GPUs back to them."""
        return [
            leaf if device not in self._hosts else self._hosts[device].load(leaf)
            for leaf, device in zip(leaves, devices, strict=True)
        ]

    def _read(
        self, index: int, leaves: list[Any], layout: _pytree.TreeSpec, devices: list[torch.device | None], copy: bool
    ) -> Any:
        if self._folder is not None:
            tensors, _ = open_tensors(_file(self._folder, index))
            leaves = [tensors.get(str(number), leaf) for number, leaf in enumerate(leaves)]
        if self._hosts:
            loaded = self._loading[1] if self._loading is not None and self._loading[0] == index else None
            leaves = self._load(leaves, devices) if loaded is None else loaded
            following = self._entries.get(index + 1)
            self._loading = None if following is None else (index + 1, self._load(following[0], following[2]))
        leaves = [_arrived(leaf, device, copy) for leaf, device in zip(leaves, devices, strict=True)]
        return _pytree.tree_unflatten(leaves, layout)


def _arrived(leaf: Any, device: torch.device | None, copy: bool) -> Any:
    if device is None:
        return leaf
    return leaf.wait() if isinstance(leaf, LoadedTensor) else leaf.to(device, copy=copy)


def _file(folder: tempfile.TemporaryDirectory, index: int) -> Path:
    return Path(folder.name) / f"{index}.safetensors"
