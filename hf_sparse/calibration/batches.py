"""Batches of a model's inputs: a mapping of keyword arguments, a tuple of positional arguments, or one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree


def call_model(model: nn.Module, batch: Any) -> Any:
    """Calls `model` with the arguments in `batch` and returns its outputs."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """Returns `batch` with every tensor copied to `device`. Always a copy, as a model may write to its inputs.

    Tensors in pinned memory are copied without waiting for the device.
    """
    return _map_tensors(
        lambda tensor: tensor.to(device, copy=True, non_blocking=device.type == "cuda" and tensor.is_pinned()), batch
    )


def pin_memory(batch: Any) -> Any:
    """Returns `batch` with the tensors of the CPU copied to pinned memory, from which CUDA copies faster."""
    return _map_tensors(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor, batch)


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    if torch.is_tensor(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        return {name: _map_tensors(function, value) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map_tensors(function, value) for value in batch)
    return batch


def first_row(batch: Any) -> Any:
    """Returns the first row of a batch, or the whole batch if its tensors differ in their number of rows.

    Example:
        >>> first_row({"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1])})
        {'input_ids': tensor([[1, 2]]), 'labels': tensor([0])}
    """
    return batch if num_rows(batch) is None else slice_rows(batch, 0, 1)


def num_rows(batch: Any) -> int | None:
    """Returns the number of rows of a batch; None if it has none, or if its tensors differ in their number.

    Example:
        >>> num_rows({"input_ids": torch.ones(3, 5), "labels": torch.ones(3)})
        3
        >>> num_rows((torch.ones(3, 5), torch.ones(2)))
    """
    leaves = _pytree.tree_leaves(_as_dict(batch))
    counts = {len(leaf) if leaf.ndim else 0 for leaf in leaves if torch.is_tensor(leaf)}
    return counts.pop() or None if len(counts) == 1 else None


def slice_rows(batch: Any, start: int, stop: int) -> Any:
    """Returns the rows from `start` up to `stop` of a batch whose tensors have the same number of rows.

    Example:
        >>> slice_rows({"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]])}, 1, 3)
        {'input_ids': tensor([[3, 4],
                [5, 6]])}
    """
    return _pytree.tree_map(lambda leaf: leaf[start:stop] if torch.is_tensor(leaf) else leaf, _as_dict(batch))


def concatenate_batches(batches: Sequence[Any]) -> Any:
    """Concatenates batches along their first dimension.

    Raises:
        ValueError: if the batches differ in their names, in what is not a tensor, or in a tensor's shape beyond the
            first dimension.

    Example:
        >>> concatenate_batches([{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3, 4]])}])
        {'input_ids': tensor([[1, 2],
                [3, 4]])}
    """
    flat = [_pytree.tree_flatten(_as_dict(batch)) for batch in batches]
    layout = flat[0][1]
    shapes = [[leaf.shape[1:] if torch.is_tensor(leaf) else leaf for leaf in leaves] for leaves, _ in flat]
    if any(other != layout for _, other in flat) or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "calibration batches of different lengths or kinds cannot be concatenated, which `forwards=1` needs: pad "
            "them to one length, or use `forwards=2`."
        )
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return _pytree.tree_unflatten(
        [torch.cat(column) if torch.is_tensor(column[0]) else column[0] for column in columns], layout
    )


def can_concatenate(batches: Sequence[Any]) -> bool:
    """Returns whether batches have one length, so that `concatenate_batches` accepts them.

    Example:
        >>> can_concatenate([torch.zeros(2, 3), torch.zeros(1, 3)])
        True
    """
    flat = [_pytree.tree_flatten(_as_dict(batch)) for batch in batches]
    shapes = [
        (layout, [leaf.shape[1:] if torch.is_tensor(leaf) else leaf for leaf in leaves]) for leaves, layout in flat
    ]
    return all(other == shapes[0] for other in shapes)


def _as_dict(batch: Any) -> Any:
    """Turns mappings of other classes (BatchEncoding, UserDict) into a dict, the only one that pytree flattens."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def count_tokens(batch: Any) -> int:
    """Returns the number of tokens in a batch without padding.

    These are the ones of a 2-D `attention_mask`. Without one: the entries of the first integer tensor, or else the
    product of all dimensions but the last of the first tensor.

    Example:
        >>> ids, mask = torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> count_tokens({"input_ids": ids, "attention_mask": mask})
        4
        >>> count_tokens(torch.ones(2, 3))
        2
    """
    mask = _attention_mask(batch)
    if mask is not None:
        return int(mask.sum())
    tensors = [leaf for leaf in _pytree.tree_leaves(_as_dict(batch)) if torch.is_tensor(leaf) and leaf.ndim]
    for tensor in tensors:
        if not tensor.is_floating_point():
            return tensor.numel()
    return tensors[0].shape[:-1].numel() if tensors else 0


def is_padded(batch: Any) -> bool:
    """Whether the attention mask of a batch leaves out any token."""
    mask = _attention_mask(batch)
    return mask is not None and not bool(mask.bool().all())


def _attention_mask(batch: Any) -> torch.Tensor | None:
    """Returns the 2-D attention mask (B, T) of a batch, None if it has none."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if torch.is_tensor(mask) and mask.ndim == 2 else None


def token_masks(batch: Any, has_decoder: bool = False) -> list[torch.Tensor]:
    """Returns the masks of a batch's real tokens, bool (B, T) with False at padding.

    Args:
        batch: the model's keyword arguments, of which `attention_mask` and `decoder_attention_mask` are read. Batches
            of other types have no mask.
        has_decoder: whether the model has a decoder beside its encoder. Its tokens are `decoder_input_ids`, or
            `labels`, where -100 marks padding.

    Example:
        >>> token_masks({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])})
        [tensor([[ True, False]])]
    """
    if not isinstance(batch, Mapping):
        return []
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if has_decoder:
        token_ids = [batch.get("input_ids"), batch.get("decoder_input_ids")]
        if masks[1] is None and torch.is_tensor(batch.get("labels")):
            masks[1] = batch["labels"] != -100
        # Tokens without a mask get one of ones, so that inputs of equal length in encoder and decoder are noticed.
        masks = [
            torch.ones_like(ids) if mask is None and torch.is_tensor(ids) else mask
            for mask, ids in zip(masks, token_ids, strict=True)
        ]
    return [mask.bool() for mask in masks if torch.is_tensor(mask) and mask.ndim == 2]


def mask_for_inputs(masks: Sequence[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor | None:
    """Returns the mask of the real tokens among a layer's inputs.

    Args:
        masks: as `token_masks` returns them.
        inputs: of a layer, (..., I), or (B * T, I) with rows and tokens flattened.

    Returns:
        A bool tensor of shape `inputs.shape[:-1]`; None if no mask has that shape or no token is padding.

    Raises:
        ValueError: if two different masks have that shape.
    """
    shape = inputs.shape[:-1]
    fitting = [mask for mask in masks if mask.shape == shape or (len(shape) == 1 and mask.numel() == len(inputs))]
    if not fitting:
        return None
    if any(not torch.equal(mask, fitting[0]) for mask in fitting[1:]):
        raise ValueError(
            f"inputs of encoder and decoder are both {tuple(fitting[0].shape)} tokens, so that their masks cannot be "
            "distinguished: pad them to different lengths."
        )
    return None if bool(fitting[0].all()) else fitting[0].reshape(shape)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether `model` is a causal language model, judged by the name of its class."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def with_labels(model: nn.Module, batch: Any) -> Any:
    """Returns a batch of a causal language model with its tokens as `labels`, -100 at padding.

    Batches that have labels, and those of other models, are returned as they are.

    Example:
        >>> class TinyForCausalLM(nn.Module): ...
        >>> batch = {"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.tensor([[1, 0]])}
        >>> with_labels(TinyForCausalLM(), batch)["labels"]
        tensor([[   7, -100]])
    """
    if not is_causal_lm(model) or not isinstance(batch, Mapping) or "labels" in batch or "input_ids" not in batch:
        return batch
    labels = batch["input_ids"].clone()
    if torch.is_tensor(batch.get("attention_mask")):
        labels[~batch["attention_mask"].bool()] = -100
    return dict(batch) | {"labels": labels}
