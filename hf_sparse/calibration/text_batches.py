"""Texts as batches that a model takes: calibration data, and data to evaluate on.

Decoders get blocks: texts are joined and cut into full blocks, without padding. Other models get rows: one text, or
pair of texts, in each, with padding that the attention mask leaves out.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from .batches import is_causal
from .data_files import quoted
from .labels import Labels
from .text_rows import as_table, is_text, text_columns


# Texts that a tokenizer gets at once, and those by which the mean length of a row is told.
_AT_ONCE = 256


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
    """Batches for `prune_oneshot`.

    Args:
        data: a data set of the datasets library, or texts, pairs of texts, or mappings with them; or batches that
            are ready, which are given back as they are.
        tokenizer: of the model.
        model: that is to be pruned.
        length: tokens of a block, or at most of a row.
        samples: how many blocks or rows, from all over the data.
        batch_size: how many of them in a batch.
        seed: which ones.
        text_column: the column of the texts, or both columns of pairs, also as "first,second". Left out: "text",
            "sentence", or the only column of texts.
        label_column: labels of a classifier, or the target texts of an encoder with a decoder. Left out: "label" or
            "labels", for classifiers, where there is one.
        per_row: take each text for a sample of its own; so it always is for other than causal models.
        same_length: pad all batches to one length, which forwards=1 needs.

    Raises:
        ValueError: too little text, unknown columns, labels that are no labels, a length beyond the model's
            positions.

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
    if not isinstance(data, Dataset):
        data = list(data)
        if data and not is_text(data[0]):
            return data
    reader = TextReader(tokenizer, model, length, batch_size, text_column, label_column, per_row, same_length)
    return reader.sample(data, samples, seed)


class TextReader:
    """Texts to batches. For the arguments see `calibration_batches`."""

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
        self._tokenizer, self._model, self._length = tokenizer, model, length
        self._batch_size, self._same_length = batch_size, same_length
        self._text_column, self._label_column = text_column, label_column
        self.per_row = per_row or not is_causal(model)
        tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # which one does not matter: it is masked
        self._padding = next(token for token in tokens if token is not None)
        self._labels = Labels(tokenizer, model, length)
        for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}: it must be {least} or more.")
        limit = positions(model, tokenizer)
        if limit is not None and length > limit:
            raise ValueError(f"length {length} is beyond the model's {limit} positions: use length={limit} or less.")

    def sample(self, data: Dataset | Iterable[Any], samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """So many blocks or rows, chosen by the seed from all over the data.

        Raises:
            ValueError: there are fewer, among others.
        """
        if samples < 1:
            raise ValueError(f"samples is {samples}: it must be 1 or more.")
        rows = self._rows(data)
        order = random.Random(seed)
        if self.per_row:
            numbers = list(range(len(rows)))
            order.shuffle(numbers)
            found = self._encode(rows, numbers, samples)
        else:
            found = self._cut(rows, self._shuffled_runs(rows, order), samples)
        if len(found) < samples:
            unit = "rows with text" if self.per_row else f"blocks of {self._length} tokens"
            less = "" if self.per_row else ", or a smaller length"
            raise ValueError(
                f"{samples} samples are asked for, but the calibration data of {len(rows)} rows are {len(found)} "
                f"{unit}: give more text, or samples={len(found)}{less}."
            )
        return self._batches(found)

    def first(self, data: Dataset | Iterable[Any], limit: int | None = None) -> list[dict[str, torch.Tensor]]:
        """The first blocks or rows of the data, or all.

        Raises:
            ValueError: there is none, among others.
        """
        rows = self._rows(data)
        numbers = range(len(rows))
        found = (self._encode if self.per_row else self._cut)(rows, numbers, limit)
        if not found:
            unit = "row with text" if self.per_row else f"block of {self._length} tokens"
            raise ValueError(f"{len(rows)} rows hold not one {unit}: give more text, or a smaller length.")
        return self._batches(found)

    # Rows

    def _rows(self, data: Dataset | Iterable[Any]) -> Dataset:
        """The columns that matter, texts first."""
        rows, known = (data, None) if isinstance(data, Dataset) else as_table(list(data))
        texts = text_columns(rows, self._text_column or known)
        if not self.per_row and len(texts) > 1:
            raise ValueError(f"pairs of texts ({quoted(texts)}) are not cut into blocks: name one text_column.")
        labels = self._labels.column(rows, self._label_column) if self.per_row else None
        self._texts, self._target = texts, labels
        return rows.select_columns([*texts, *([labels] if labels else [])])

    def _text(self, row: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The texts of a row; None where the first is empty."""
        texts = tuple(row[name] for name in self._texts)
        wrong = next((text for text in texts if text is not None and not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(f"a row of column {quoted(self._texts)} holds {wrong!r}: it must be text.")
        return tuple(text or "" for text in texts) if (texts[0] or "").strip() else None

    def _encode(self, rows: Dataset, numbers: Iterable[int], limit: int | None) -> list[dict[str, Any]]:
        """Rows with text, truncated, in the order of `numbers`."""
        samples = []
        for row in rows.select(list(numbers)) if not isinstance(numbers, range) else rows:
            if limit is not None and len(samples) == limit:
                break
            texts = self._text(row)
            if texts is not None:
                sample = dict(self._tokenizer(*texts, truncation=True, max_length=self._length))
                sample.setdefault("attention_mask", [1] * len(sample["input_ids"]))
                if self._target is not None:
                    sample["labels"] = self._labels.read(row[self._target])
                samples.append(sample)
        return samples

    # Blocks

    def _shuffled_runs(self, rows: Dataset, order: random.Random) -> list[int]:
        """The numbers of all rows: runs of neighbours, each long enough for about one block, in random order. So a
        few blocks come from all over the data, and what belongs together stays together."""
        some = order.sample(range(len(rows)), min(len(rows), _AT_ONCE))
        tokens = sum(len(ids) for ids in self._token_ids(rows, some))
        each = max(1, -(-self._length * len(some) // max(1, tokens)))
        runs = [range(start, min(start + each, len(rows))) for start in range(0, len(rows), each)]
        order.shuffle(runs)
        return list(chain.from_iterable(runs))

    def _cut(self, rows: Dataset, numbers: Sequence[int], limit: int | None) -> list[dict[str, Any]]:
        """Full blocks of the joined rows, in the order of `numbers`."""
        blocks, rest = [], []
        for ids in self._token_ids(rows, numbers):
            rest += ids
            while len(rest) >= self._length and (limit is None or len(blocks) < limit):
                blocks.append({"input_ids": rest[: self._length]})
                rest = rest[self._length :]
            if len(blocks) == limit:
                break
        return blocks

    def _token_ids(self, rows: Dataset, numbers: Sequence[int]) -> Iterator[list[int]]:
        numbers = iter(numbers)
        while some := list(islice(numbers, _AT_ONCE)):
            texts = [text[0] for text in map(self._text, rows.select(some)) if text is not None]
            if texts:
                # verbose: texts longer than the model's limit are no fault here, they are cut.
                yield from self._tokenizer(texts, verbose=False)["input_ids"]

    # Batches

    def _batches(self, samples: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Rows of similar length together, so that little is padding."""
        samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
        longest = len(samples[-1]["input_ids"])
        return [
            self._batch(samples[start : start + self._batch_size], longest if self._same_length else None)
            for start in range(0, len(samples), self._batch_size)
        ]

    def _batch(self, samples: list[dict[str, Any]], longest: int | None) -> dict[str, torch.Tensor]:
        labels = [sample.pop("labels") for sample in samples if "labels" in sample]
        width = longest or max(len(sample["input_ids"]) for sample in samples)
        batch = {
            name: torch.tensor([sample[name] + [0] * (width - len(sample[name])) for sample in samples])
            for name in samples[0]
        }
        if self.per_row:
            padding = ~batch["attention_mask"].bool()
            batch["input_ids"].masked_fill_(padding, self._padding)
        return batch | ({"labels": self._labels.stack(labels)} if labels else {})


def positions(model: nn.Module, tokenizer: Any) -> int | None:
    """How many tokens the model takes at once; None if it does not say."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # RoBERTa's positions begin at 2, which only its tokenizer tells.
    return tokenizer.model_max_length if 0 < limit - tokenizer.model_max_length <= 4 else limit
