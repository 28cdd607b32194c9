"""Masks to start from: the zeros of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...distributed import Communicator, raise_on_all_ranks
from ...inspection import InspectionError
from ...inspection.zeros import CheckpointZeros
from .parts import WeightParts


def read_masks(source: str, weights: Sequence[WeightParts], communicator: Communicator) -> dict[str, torch.Tensor]:
    """Returns the mask of each weight by name, of the shape of its shard's tensor: False where the weight is zero in a
    checkpoint. All ranks call this, and each reads what it holds.

    Args:
        source: a folder or a Hub name.
        weights: of the model.
        communicator: of the ranks that hold the weights.

    Raises:
        InspectionError: the checkpoint cannot be read, has no such weights, or no zeros in them.
    """
    with raise_on_all_ranks(InspectionError):
        zeros = CheckpointZeros(source, {weight.name: weight.layer.shape for weight in weights})
        masks = {weight.name: _read(zeros, weight) for weight in weights}
    if not communicator.any(not all(bool(mask.all()) for mask in masks.values())):
        raise InspectionError(
            f"`prior` is {source}, but the weights that are pruned here have no zeros there: give a checkpoint that "
            "was pruned, as by hf-sparse prune, or leave `prior` out."
        )
    return masks


def _read(zeros: CheckpointZeros, weight: WeightParts) -> torch.Tensor:
    tensor = weight.shard.tensor
    parts = [zeros.keep_mask(weight.name, region).reshape(-1) for region in weight.shard.local_regions]
    whole = torch.cat(parts) if parts else torch.empty(0, dtype=torch.bool)
    return whole.view(tensor.shape).to(tensor.device)
