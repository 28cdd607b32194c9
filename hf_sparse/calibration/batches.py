"""Batches: what a model is called with. Mappings of keyword arguments, tuples of positional ones, or a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree


def call(model: nn.Module, batch: Any) -> Any:
    """The model with a batch as its arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch whose tensors are on `device`, copies of the given ones: a model may write to its inputs."""
    if torch.is_tensor(batch):
        return batch.to(device, copy=True)
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(on_device(value, device) for value in batch)
    return batch


def first_row(batch: Any) -> Any:
    """The first row of a batch whose tensors have as many rows each, or else the whole batch.

    Example:
        >>> first_row({"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1])})
        {'input_ids': tensor([[1, 2]]), 'labels': tensor([0])}
    """
    leaves, layout = _pytree.tree_flatten(_plain(batch))
    rows = {len(leaf) if leaf.ndim else 0 for leaf in leaves if torch.is_tensor(leaf)}
    if len(rows) != 1 or 0 in rows:
        return batch
    return _pytree.tree_unflatten([leaf[:1] if torch.is_tensor(leaf) else leaf for leaf in leaves], layout)


def merged(batches: Sequence[Any]) -> Any:
    """All batches as one.

    Raises:
        ValueError: they do not fit together.

    Example:
        >>> merged([{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3, 4]])}])
        {'input_ids': tensor([[1, 2],
                [3, 4]])}
    """
    flat = [_pytree.tree_flatten(_plain(batch)) for batch in batches]
    layout = flat[0][1]
    shapes = [[leaf.shape[1:] if torch.is_tensor(leaf) else leaf for leaf in leaves] for leaves, _ in flat]
    if any(other != layout for _, other in flat) or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "calibration batches of different lengths or kinds cannot become one, which forwards=1 needs: make them "
            "of one length, or use forwards=2."
        )
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return _pytree.tree_unflatten(
        [torch.cat(column) if torch.is_tensor(column[0]) else column[0] for column in columns], layout
    )


def _plain(batch: Any) -> Any:
    """A mapping of any kind as a dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def count_tokens(batch: Any) -> int:
    """How many tokens of a batch count: those of its attention mask, or else the entries of its first tensor of whole
    numbers, or the rows of its first tensor.

    Example:
        >>> ids, mask = torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> count_tokens({"input_ids": ids, "attention_mask": mask})
        4
        >>> count_tokens(torch.ones(2, 3))
        2
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if torch.is_tensor(mask) and mask.ndim == 2:
        return int(mask.sum())
    tensors = [leaf for leaf in _pytree.tree_leaves(_plain(batch)) if torch.is_tensor(leaf) and leaf.ndim]
    whole = [tensor for tensor in tensors if not tensor.is_floating_point()]
    if whole:
        return whole[0].numel()
    return tensors[0].shape[:-1].numel() if tensors else 0


def is_padded(batch: Any) -> bool:
    """Whether some tokens of a batch do not count."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return torch.is_tensor(mask) and mask.ndim == 2 and not bool(mask.bool().all())


def token_masks(batch: Any, decodes: bool = False) -> list[torch.Tensor]:
    """Which tokens of a batch are no padding, bool (B, T): what `attention_mask` and `decoder_attention_mask` say.

    Args:
        batch: keyword arguments of the model; of others nothing is known.
        decodes: whether there is a decoder beside an encoder. It gets its tokens from `decoder_input_ids`, or from
            `labels`, where -100 is padding.

    Example:
        >>> token_masks({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])})
        [tensor([[ True, False]])]
    """
    if not isinstance(batch, Mapping):
        return []
    masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
    if decodes:
        ids = [batch.get("input_ids"), batch.get("decoder_input_ids")]
        if masks[1] is None and torch.is_tensor(batch.get("labels")):
            masks[1] = batch["labels"] != -100
        # what has no mask counts, also where it is as long as what has one
        masks = [
            torch.ones_like(own) if mask is None and torch.is_tensor(own) else mask for mask, own in zip(masks, ids)
        ]
    return [mask.bool() for mask in masks if torch.is_tensor(mask) and mask.ndim == 2]


def matching(masks: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    """The mask of the tokens of `x` (..., I), of shape (...); None where all count, or no mask fits.

    Raises:
        ValueError: two masks fit, and they differ.
    """
    shape = x.shape[:-1]
    fitting = [mask for mask in masks if mask.shape == shape or (len(shape) == 1 and mask.numel() == len(x))]
    if not fitting:
        return None
    if any(not torch.equal(mask, fitting[0]) for mask in fitting[1:]):
        raise ValueError(
            f"inputs of encoder and decoder are both {tuple(fitting[0].shape)} tokens, so that padding cannot be told "
            "apart: pad them to different lengths."
        )
    return None if bool(fitting[0].all()) else fitting[0].reshape(shape)


def is_causal(model: nn.Module) -> bool:
    """Whether it is a language model that predicts each token from those before it, by the name of its class."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def with_labels(model: nn.Module, batch: Any) -> Any:
    """A batch for a causal language model with its own tokens as labels, where it has none; padding is left out.

    Example:
        >>> class TinyForCausalLM(nn.Module): ...
        >>> batch = {"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.tensor([[1, 0]])}
        >>> with_labels(TinyForCausalLM(), batch)["labels"]
        tensor([[   7, -100]])
    """
    if not is_causal(model) or not isinstance(batch, Mapping) or "labels" in batch or "input_ids" not in batch:
        return batch
    labels = batch["input_ids"].clone()
    if torch.is_tensor(batch.get("attention_mask")):
        labels[~batch["attention_mask"].bool()] = -100
    return dict(batch) | {"labels": labels}
