"""Masking of tokens that a masked language model is to predict."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def is_masked_lm(model: nn.Module) -> bool:
    """Whether `model` is a masked language model, judged by the name of its class."""
    return type(model).__name__.endswith("ForMaskedLM")


def mask_tokens(
    batches: Iterable[dict[str, torch.Tensor]], tokenizer: Any, share: float = 0.15, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Masks a share of the tokens of each row, and makes them the labels.

    The positions depend on the seed and the tokens of the row alone: not on its batch, nor on padding.

    Args:
        batches: with `input_ids` (B, T), and `attention_mask` where there is padding.
        tokenizer: of the model. Its special tokens are not masked.
        share: of the other tokens, above 0 and at most 1; round(share x number), at least one, in each row.
        seed: of the choice of positions.

    Returns:
        Batches with the mask token in place of the chosen tokens, and with `labels`, -100 elsewhere.

    Raises:
        ValueError: if the tokenizer has no mask token.

    Example:
        >>> from transformers import BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "once", "upon"]
        >>> tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        >>> (batch,) = mask_tokens([{"input_ids": torch.tensor([[2, 5, 6, 3]])}], tokenizer, share=1.0)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[2, 4, 4, 3]], [[-100, 5, 6, -100]])
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: it must be above 0 and at most 1, as in 0.15.")
    mask_token = mask_token_id(tokenizer)
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
    masked = []
    for batch in batches:
        ids = batch["input_ids"]
        candidates = ~torch.isin(ids, special.to(ids.device))
        if "attention_mask" in batch:
            candidates &= batch["attention_mask"].bool()
        chosen = torch.zeros_like(candidates)
        for row, row_candidates, row_chosen in zip(ids, candidates, chosen, strict=True):
            positions = row_candidates.nonzero()[:, 0]
            if len(positions):
                count = max(1, round(share * len(positions)))
                row_chosen[positions[_permutation(row[positions], seed)[:count].to(ids.device)]] = True
        labels = ids.masked_fill(~chosen, -100)
        masked.append(dict(batch) | {"input_ids": ids.masked_fill(chosen, mask_token), "labels": labels})
    return masked


def mask_token_id(tokenizer: Any) -> int:
    """Returns the mask token of a tokenizer.

    Raises:
        ValueError: if it has none.
    """
    token = getattr(tokenizer, "mask_token_id", None)
    if token is None:
        raise ValueError(
            "the tokenizer has no mask token, which masked language models are evaluated with: name the model's own "
            "with `tokenizer_name`, or leave `eval` out."
        )
    return int(token)


def _permutation(tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns a permutation of the positions of `tokens` that depends on them and the seed alone."""
    digest = zlib.crc32(tokens.cpu().long().numpy().astype("<i8").tobytes(), seed)
    return torch.randperm(len(tokens), generator=torch.Generator().manual_seed(digest))
