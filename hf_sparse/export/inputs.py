"""Inputs that a model accepts: of real texts, or random ones of a given size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


def input_names(model: PreTrainedModel) -> list[str]:
    """Returns the names of the inputs that an exported model takes: token ids with their mask, or images.

    Raises:
        ValueError: the model is an encoder-decoder, or its main input is neither text nor images.
    """
    config, main = model.config, getattr(model, "main_input_name", "input_ids")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f'models of type "{config.model_type}" have an encoder and a decoder, which run in two programs: export '
            'their parts by themselves, or use `runtime="torch"`.'
        )
    if main == "pixel_values":
        return [main]
    if main != "input_ids":
        raise ValueError(f'models of type "{config.model_type}" take "{main}": only texts and images are supported.')
    return ["input_ids", "attention_mask"]


def random_inputs(model: PreTrainedModel, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random inputs without padding.

    Args:
        model: a model of transformers that takes texts or images.
        batch_size: number of texts or images.
        length: number of tokens of a text.
        seed: of the token ids or pixels.

    Returns: the inputs by name: `input_ids` and `attention_mask` (B, T) int64, or `pixel_values` (B, C, H, W) float32.

    Raises:
        ValueError: the model takes other inputs, or its positions are fewer than `length`.
    """
    names, config = input_names(model), cast(Any, model.config)
    generator = torch.Generator().manual_seed(seed)
    if names == ["pixel_values"]:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(batch_size, config.num_channels, height, width, generator=generator)}
    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions:
        raise ValueError(f"`length` is {length}: the model has {positions} positions.")
    # The first ids are often special: padding, which some models detect by its id.
    first = min(10, config.vocab_size // 2)
    ids = torch.randint(first, config.vocab_size, (batch_size, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_inputs(
    texts: Iterable[str], tokenizer: Any, length: int, batch_size: int = 8
) -> list[dict[str, torch.Tensor]]:
    """Returns batches of tokenized texts, padded to the longest of their batch.

    Args:
        texts: the texts.
        tokenizer: of the model.
        length: largest number of tokens of a text.
        batch_size: number of texts in a batch.
    """
    rows: Sequence[str] = list(texts)
    batches = []
    for start in range(0, len(rows), batch_size):
        encoded = tokenizer(rows[start : start + batch_size], truncation=True, max_length=length)["input_ids"]
        # Not by the tokenizer, which may have no padding token: the mask says what is padding.
        ids = pad_sequence([torch.tensor(row) for row in encoded], batch_first=True, padding_value=_pad_id(tokenizer))
        lengths = torch.tensor([[len(row)] for row in encoded])
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _pad_id(tokenizer: Any) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
