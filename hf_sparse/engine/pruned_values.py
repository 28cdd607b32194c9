"""The values of pruned weights, kept beside the model so that they can return.

Both functions work on bits, as `masks` does: values return as they were, and zeros are +0.0.
"""

from __future__ import annotations

import torch

from ..numerics import BITS, chunk_size


@torch.no_grad()
def store_pruned(weight: torch.Tensor, values: torch.Tensor, mask_bits: torch.Tensor) -> None:
    """Moves the pruned entries of a weight into `values`, and leaves +0.0 in their place.

    Args:
        weight: any shape.
        values: like the weight; becomes +0.0 where the weight is kept.
        mask_bits: int8 of the same shape, -1 where the weight is kept and 0 where it is pruned.

    Example:
        >>> weight, values = torch.tensor([1.0, -2.0]), torch.zeros(2)
        >>> store_pruned(weight, values, torch.tensor([-1, 0], dtype=torch.int8))
        >>> weight, values
        (tensor([1., 0.]), tensor([ 0., -2.]))
        >>> restore_pruned(weight, values)
        >>> weight
        tensor([ 1., -2.])
    """
    tensors = weight.view(BITS[weight.dtype]), values.view(BITS[values.dtype]), mask_bits
    size = chunk_size(weight.device)
    together = all(tensor.is_contiguous() for tensor in tensors) and weight.numel() > size
    chunks = zip(*(tensor.view(-1).split(size) for tensor in tensors)) if together else [tensors]
    for words, own, bits in chunks:
        torch.bitwise_and(words, ~bits, out=own)
        words.bitwise_xor_(own)


@torch.no_grad()
def restore_pruned(weight: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values that `store_pruned` has taken back into the weight, which is +0.0 there. Others do not change."""
    weight.view(BITS[weight.dtype]).bitwise_or_(values.view(BITS[values.dtype]))
