"""Batches of token ids from texts, to calibrate or to evaluate on.

Causal language models get blocks: texts are tokenized, joined and cut into blocks of equal length, without padding.
Other models get rows: each is one text or one pair of texts, padded to the longest in its batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .batches import is_causal_lm
from .data_files import format_names
from .masking import is_masked_lm, mask_token_id, mask_tokens
from .rows import row_encoder
from .text_tables import is_dataset, is_text, to_table


if TYPE_CHECKING:
    from datasets import Dataset


# Texts per call of the tokenizer, and rows from which the mean number of tokens is estimated.
_CHUNK = 256


def calibration_batches(
    data: Dataset | Iterable[Any],
    tokenizer: Any,
    model: nn.Module,
    *,
    length: int,
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    per_row: bool = False,
    same_length: bool = False,
) -> list[Any]:
    """Makes the calibration batches of `prune_oneshot` from texts.

    Args:
        data: a `datasets.Dataset`, or an iterable of texts, of pairs of texts, or of mappings with texts. Ready-made
            batches of tensors are returned as they are.
        tokenizer: of the model.
        model: to prune. A causal language model gets blocks of `length` tokens, cut from the joined texts.
        length: tokens per block, or the largest number of tokens of a row.
        samples: the number of blocks or rows, drawn from all over the data.
        batch_size: the number of blocks or rows in a batch.
        seed: of the draw.
        text_column: the column of the texts, or both columns of pairs, also as "first,second". If None: "text",
            "sentence", or the only column of strings.
        label_column: the column of the labels or of an encoder-decoder's target texts, as in `evaluation_batches`.
        per_row: make each text a row of its own for causal language models as well.
        same_length: pad all batches to one length, as `forwards=1` needs.

    Returns:
        A list of dicts of tensors: `input_ids` (B, T) and, for rows, `attention_mask`, `labels` and whatever else the
        tokenizer returns.

    Raises:
        ValueError: if there is too little text, a column is missing, a label is invalid, or `length` exceeds the
            model's positions.
        ImportError: if the datasets library is not installed.

    Example:
        >>> from transformers import BertConfig, BertModel, BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "once", "upon", "a", "time"]
        >>> tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        >>> sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
        >>> model = BertModel(BertConfig(vocab_size=8, **sizes))
        >>> texts = ["once", "once upon a time"]
        >>> calibration_batches(texts, tokenizer, model, length=5, samples=2)[0]["input_ids"]
        tensor([[2, 4, 3, 0, 0],
                [2, 4, 5, 6, 3]])
    """
    if not is_dataset(data):
        data = list(data)
        if data and not is_text(data[0]):
            return data
    reader = TextReader(tokenizer, model, length, batch_size, text_column, label_column, per_row, same_length)
    return reader.sample(data, samples, seed)


def evaluation_batches(
    data: Dataset | Iterable[Any],
    tokenizer: Any,
    model: nn.Module,
    *,
    length: int,
    samples: int | None = None,
    batch_size: int = 8,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    per_row: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Makes the batches of `evaluate_model` from texts: all of them in order, or the first `samples`.

    Args:
        data, tokenizer, model, length, batch_size, text_column, per_row: as in `calibration_batches`.
        samples: the largest number of blocks or rows.
        label_column: the column of the labels: of classifiers (None for "label" or "labels"), one for each word of
            token classifiers, whose texts are lists of words ("labels", "label", "ner_tags" or "tags"), answers as in
            SQuAD ("answers"), or target texts. Masked language models need none: `mask_tokens` makes them.

    Raises:
        ValueError: as `calibration_batches`, and if the tokenizer of a masked language model has no mask token.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM, BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "once"]
        >>> tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        >>> sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 4}
        >>> model = BertForMaskedLM(BertConfig(vocab_size=6, **sizes))
        >>> (batch,) = evaluation_batches(["once"], tokenizer, model, length=5)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[2, 4, 3]], [[-100, 5, -100]])
    """
    reader = TextReader(tokenizer, model, length, batch_size, text_column, label_column, per_row)
    return reader.first(data, samples)


class TextReader:
    """Makes batches from texts. The arguments are those of `calibration_batches`."""

    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,
        length: int,
        batch_size: int = 8,
        text_column: str | Sequence[str] | None = None,
        label_column: str | None = None,
        per_row: bool = False,
        same_length: bool = False,
    ):
        self._tokenizer, self._length = tokenizer, length
        self._batch_size, self._same_length = batch_size, same_length
        self._requested_text_column, self._requested_label_column = text_column, label_column
        self.per_row = per_row or not is_causal_lm(model)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # any id will do, as padding is masked
        self._pad_token_id = next(token for token in candidates if token is not None)
        self._rows, self._is_masked_lm = row_encoder(tokenizer, model, length), is_masked_lm(model)
        for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"`{name}` is {value}: it must be {least} or more.")
        limit = max_positions(model, tokenizer)
        if limit is not None and length > limit:
            raise ValueError(
                f"`length` {length} is beyond the model's {limit} positions: use `length={limit}` or less."
            )

    def sample(self, data: Dataset | Iterable[Any], samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """Makes batches of blocks or rows drawn at random from all over the data, which must give enough of them."""
        if samples < 1:
            raise ValueError(f"`samples` is {samples}: it must be 1 or more.")
        rows = self._read_table(data)
        generator = random.Random(seed)
        if self.per_row:
            indices = list(range(len(rows)))
            generator.shuffle(indices)
            drawn = self._tokenize_rows(rows, indices, samples)
        else:
            drawn = self._cut_blocks(rows, self._shuffled_runs(rows, generator), samples)
        if len(drawn) < samples:
            unit = "rows with text" if self.per_row else f"blocks of {self._length} tokens"
            found = f"only {len(drawn)} {unit}" if drawn else f"no {unit}"
            remedies = ["give more text"] + [f"use `samples={len(drawn)}`"] * bool(drawn)
            remedies += [] if self.per_row else ["lower `length`"]
            raise ValueError(
                f"`samples` is {samples}, but the {len(rows)} rows of the calibration data give {found}: "
                f"{', or '.join(remedies)}."
            )
        return self._make_batches(drawn)

    def first(self, data: Dataset | Iterable[Any], limit: int | None = None) -> list[dict[str, torch.Tensor]]:
        """Makes batches of the first `limit` blocks or rows of the data, of all if `limit` is None.

        They are to evaluate on: a masked language model gets masked tokens, with `labels`.
        """
        if self._is_masked_lm:
            mask_token_id(self._tokenizer)  # raises if there is none, before the work
        rows = self._read_table(data)
        samples = (self._tokenize_rows if self.per_row else self._cut_blocks)(rows, range(len(rows)), limit)
        if not samples:
            unit = "row with text" if self.per_row else f"block of {self._length} tokens"
            raise ValueError(f"the {len(rows)} rows do not give one {unit}: give more text, or a smaller length.")
        batches = self._make_batches(samples)
        return mask_tokens(batches, self._tokenizer) if self._is_masked_lm else batches

    def _read_table(self, data: Dataset | Iterable[Any]) -> Dataset:
        """Returns a table of the columns of texts and labels, and stores their names."""
        rows, known_columns = (data, None) if is_dataset(data) else to_table(list(data))
        text_column = self._requested_text_column or known_columns
        columns = self._rows.choose_columns(rows, text_column, self._requested_label_column, self.per_row)
        if not self.per_row and len(self._rows.text_columns) > 1:
            names = format_names(self._rows.text_columns)
            raise ValueError(f"pairs of texts ({names}) are not cut into blocks: name one `text_column`.")
        return rows.select_columns(columns)

    def _tokenize_rows(self, rows: Dataset, indices: Sequence[int], limit: int | None) -> list[dict[str, Any]]:
        """Tokenizes the first `limit` rows with text, in the order of `indices`."""
        samples: list[dict[str, Any]] = []
        for row in rows if isinstance(indices, range) else rows.select(indices):
            if len(samples) == limit:
                break
            sample = self._rows.encode(row)
            if sample is not None:
                samples.append(sample)
        return samples

    def _shuffled_runs(self, rows: Dataset, generator: random.Random) -> list[int]:
        """Returns the indices of all rows: runs of neighbours, each enough for about one block, in random order.

        So a few blocks sample the whole data, and text that continues in the next row stays together.
        """
        some = generator.sample(range(len(rows)), min(len(rows), _CHUNK))
        num_tokens = sum(len(ids) for ids in self._token_ids(rows, some))
        rows_per_run = max(1, -(-self._length * len(some) // max(1, num_tokens)))
        runs = [range(start, min(start + rows_per_run, len(rows))) for start in range(0, len(rows), rows_per_run)]
        generator.shuffle(runs)
        return list(chain.from_iterable(runs))

    def _cut_blocks(self, rows: Dataset, indices: Sequence[int], limit: int | None) -> list[dict[str, Any]]:
        """Cuts the first `limit` full blocks from the joined tokens of the rows, in the order of `indices`."""
        blocks: list[dict[str, Any]] = []
        rest: list[int] = []
        for ids in self._token_ids(rows, indices):
            rest += ids
            while len(rest) >= self._length and (limit is None or len(blocks) < limit):
                blocks.append({"input_ids": rest[: self._length]})
                rest = rest[self._length :]
            if len(blocks) == limit:
                break
        return blocks

    def _token_ids(self, rows: Dataset, indices: Sequence[int]) -> Iterator[list[int]]:
        remaining = iter(indices)
        while chunk := list(islice(remaining, _CHUNK)):
            texts = [texts[0] for texts in map(self._rows.texts_of, rows.select(chunk)) if texts is not None]
            if texts:
                # verbose=False: no warning about texts longer than the model's limit, as they are cut into blocks.
                yield from self._tokenizer(texts, verbose=False)["input_ids"]

    def _make_batches(self, samples: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Batches samples of similar length, which keeps padding short."""
        samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
        longest = len(samples[-1]["input_ids"])
        return [
            self._pad(samples[start : start + self._batch_size], longest if self._same_length else None)
            for start in range(0, len(samples), self._batch_size)
        ]

    def _pad(self, samples: list[dict[str, Any]], width: int | None) -> dict[str, torch.Tensor]:
        """Stacks samples to tensors, padded to `width` or to the longest of them."""
        labels = [sample.pop("labels") for sample in samples if "labels" in sample]
        width = width or max(len(sample["input_ids"]) for sample in samples)
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        batch = {
            name: torch.tensor([row + [0] * (width - len(row)) for row in values] if _are_lists(values) else values)
            for name, values in columns.items()
        }
        if self.per_row:
            batch["input_ids"].masked_fill_(~batch["attention_mask"].bool(), self._pad_token_id)
        return batch | ({"labels": self._rows.stack_labels(labels, width)} if labels else {})


def _are_lists(values: list[Any]) -> bool:
    return isinstance(values[0], list)


def max_positions(model: nn.Module, tokenizer: Any) -> int | None:
    """Returns the largest number of tokens that the model takes at once, None if its config has no limit."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # RoBERTa's positions start at 2, so 514 of them take 512 tokens. Only its tokenizer has that number.
    return tokenizer.model_max_length if 0 < limit - tokenizer.model_max_length <= 4 else limit
