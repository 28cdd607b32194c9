"""What a one-shot run has finished, on disk: the new weights of each stage, to go on from after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from ..files import FINISHED_BLOCK_GLOB, finished_block_file, open_tensors, write_tensors


class ResumeError(ValueError):
    """Finished stages that do not belong to this run: what differs, and the remedy."""


class FinishedSubgraphs:
    """A folder with one file for each finished stage.

    Args:
        folder: made when the first stage is finished.
        identity: of the run, see `identity_of`.
        main: whether this process writes.

    Raises:
        ResumeError: the folder holds stages of another run, or damaged ones.
    """

    def __init__(self, folder: str | Path, identity: str, main: bool = True):
        self._folder, self._identity, self._main = Path(folder), identity, main
        self.count = 0
        """Of the stages that are finished, all those before the first that is not."""
        while self._file(self.count).is_file():
            self.read(self.count)
            self.count += 1

    def write(self, subgraph: int, weights: Mapping[str, torch.Tensor], errors: Mapping[str, float]) -> None:
        """Store a stage's weights, and the errors of their outputs."""
        if self._main:
            values = {"identity": self._identity, "errors": dict(errors)}
            write_tensors(self._file(subgraph), dict(weights), {"format": "pt", "hf_sparse": json.dumps(values)})

    def read(self, subgraph: int) -> tuple[Mapping[str, torch.Tensor], dict[str, float]]:
        """What was stored."""
        path = self._file(subgraph)
        try:
            tensors, metadata = open_tensors(path)
            values = json.loads(metadata["hf_sparse"])
            identity, errors = values["identity"], dict(values["errors"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{path} is damaged or foreign: {error}. Remove it to start over from there.") from error
        if identity != self._identity:
            raise ResumeError(
                f"{path} was finished by a run with another model, config or calibration data. Give what it was "
                f"started with to go on, or remove {self._folder} to start over."
            )
        return tensors, errors

    def clear(self) -> None:
        """Remove everything: the run is complete and its result is elsewhere."""
        if self._main:
            remove_finished(self._folder)

    def _file(self, subgraph: int) -> Path:
        return self._folder / finished_block_file(subgraph)


def count_finished(folder: str | Path) -> int:
    """How many stages have been finished there, of whatever run."""
    return sum(1 for _ in Path(folder).glob(FINISHED_BLOCK_GLOB))


def remove_finished(folder: str | Path) -> None:
    """Remove what finished stages have left there, and the folder when it is empty then."""
    folder = Path(folder)
    for path in folder.glob(f"*{FINISHED_BLOCK_GLOB}"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def identity_of(config: Mapping[str, Any], weights: Iterable[tuple[str, torch.Tensor]], batches: Iterable[Any]) -> str:
    """A digest of everything that the result depends on: options, some numbers of each weight, calibration data."""
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for name, weight in weights:
        flat = weight.detach().reshape(-1)
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(_bytes(flat[:: max(1, len(flat) // 256)]))
    for batch in batches:
        leaves, layout = _pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        digest.update(str(layout).encode())
        for leaf in leaves:
            known = f"{tuple(leaf.shape)}{leaf.dtype}" if torch.is_tensor(leaf) else repr(leaf)
            digest.update(known.encode())
            digest.update(_bytes(leaf) if torch.is_tensor(leaf) else b"")
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
