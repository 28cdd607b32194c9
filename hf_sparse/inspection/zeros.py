"""The zeros of a checkpoint, as a mask of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..distributed import ShardRegion
from .checkpoint import StoredTensor, open_checkpoint
from .tiles import read_tiles
from .weight_files import InspectionError


class CheckpointZeros:
    """Reads which of a model's weights are zero in a checkpoint, region by region.

    Args:
        source: a .safetensors file, an index, a directory, or the name of a repository on the Hub.
        shapes: the shape of each weight of the model, by its name. The checkpoint may lack the first part of the
            names, or have one more, as those of the body of a model do.

    Raises:
        InspectionError: the checkpoint cannot be read, is stored as pickle, or lacks a weight; or a weight has another
            shape or is quantised.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"up.weight": torch.tensor([[0.0, 2.0, 3.0]])}, f"{folder}/model.safetensors")
        ...     zeros = CheckpointZeros(folder, {"bert.up.weight": (1, 3)})
        ...     zeros.keep_mask("bert.up.weight", ShardRegion((0, 0), (1, 2)))
        tensor([[False,  True]])
    """

    def __init__(self, source: str | Path, shapes: Mapping[str, Sequence[int]]):
        stored = open_checkpoint(source)
        by_end = {name.partition(".")[2]: tensor for name, tensor in stored.tensors.items()}
        self._tensors: dict[str, StoredTensor] = {}
        for name, shape in shapes.items():
            tensor = stored.tensors.get(name) or stored.tensors.get(name.partition(".")[2]) or by_end.get(name)
            if tensor is None:
                raise InspectionError(f'{source} has no weight "{name}": give a checkpoint of the same model.')
            if tensor.shape != tuple(shape):
                raise InspectionError(
                    f'"{name}" is {_times(tensor.shape)} in {source}, but {_times(shape)} in the model: give a '
                    "checkpoint of the same model."
                )
            if not tensor.is_float:
                raise InspectionError(
                    f'"{name}" is {tensor.dtype} in {source}, where zeros are not those of weights: give a checkpoint '
                    "that is not quantised."
                )
            self._tensors[name] = tensor

    def keep_mask(self, name: str, region: ShardRegion) -> torch.Tensor:
        """Returns where a region of a weight is not zero (bool, of the region's shape)."""
        tensor = self._tensors[name]
        ((_, values),) = read_tiles(tensor.file, tensor.name, [region])
        return values != 0


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
