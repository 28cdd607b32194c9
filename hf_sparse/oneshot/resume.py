"""Finished subgraphs of a one-shot run on disk, from which an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from ..files import FINISHED_BLOCK_GLOB, finished_block_file, open_tensors, parse_json, write_tensors


class ResumeError(ValueError):
    """Files of finished subgraphs that are damaged or belong to another run."""


class FinishedSubgraphs:
    """A folder with one file for each finished subgraph: its pruned weights and the errors of its outputs.

    Args:
        folder: is created with the first file.
        digest: of the run, see `run_digest`.
        is_main: whether this rank writes.

    Raises:
        ResumeError: the folder holds files that are damaged or belong to another run.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> FinishedSubgraphs(folder, "1f2e").write(0, {"a.weight": torch.ones(2)}, {"a.weight": 0.25})
        >>> finished = FinishedSubgraphs(folder, "1f2e")
        >>> weights, errors = finished.read(0)
        >>> finished.count, weights["a.weight"], errors
        (1, tensor([1., 1.]), {'a.weight': 0.25})
    """

    def __init__(self, folder: str | Path, digest: str, is_main: bool = True):
        self._folder, self._digest, self._is_main = Path(folder), digest, is_main
        self.count = 0
        """The number of finished subgraphs before the first that is not."""
        while self._file(self.count).is_file():
            self.read(self.count)
            self.count += 1

    def write(self, number: int, weights: Mapping[str, torch.Tensor], errors: Mapping[str, float]) -> None:
        """Stores the weights of subgraph `number` and the errors of its layers' outputs, by layer name."""
        if self._is_main:
            values = {"identity": self._digest, "errors": dict(errors)}
            write_tensors(self._file(number), dict(weights), {"format": "pt", "hf_sparse": json.dumps(values)})

    def read(self, number: int) -> tuple[Mapping[str, torch.Tensor], dict[str, float]]:
        """Returns what `write` stored for subgraph `number`.

        Raises:
            ResumeError: the file is damaged or belongs to another run.
        """
        path = self._file(number)
        try:
            tensors, metadata = open_tensors(path)
            values = parse_json(metadata["hf_sparse"])
            digest, errors = values["identity"], dict(values["errors"])
            if not all(type(error) is float for error in errors.values()):
                raise TypeError("its errors are not numbers")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} is damaged or foreign: {error}. Remove it to start over from there.") from error
        if digest != self._digest:
            raise ResumeError(
                f"{path} was written by a run with another model, config or calibration data. Use the same ones to "
                f"continue it, or remove {self._folder} to start over."
            )
        return tensors, errors

    def _file(self, number: int) -> Path:
        return self._folder / finished_block_file(number)


def count_finished_subgraphs(folder: str | Path) -> int:
    """Returns the number of finished subgraphs in a folder, of whatever run."""
    return sum(1 for _ in Path(folder).glob(FINISHED_BLOCK_GLOB))


def remove_finished_subgraphs(folder: str | Path) -> None:
    """Removes the files of finished subgraphs, also partly written ones, and the folder if nothing else is in it."""
    folder = Path(folder)
    for path in folder.glob(f"*{FINISHED_BLOCK_GLOB}"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def run_digest(config: Mapping[str, Any], weights: Iterable[tuple[str, torch.Tensor]], batches: Iterable[Any]) -> str:
    """Returns a digest of all that the result depends on: the options as JSON values, about 256 values of each weight,
    and the calibration batches."""
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(_to_bytes(flat[:: max(1, len(flat) // 256)]))
    for batch in batches:
        leaves, layout = _pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        digest.update(str(layout).encode())
        for leaf in leaves:
            if torch.is_tensor(leaf):
                digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
                digest.update(_to_bytes(leaf))
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
