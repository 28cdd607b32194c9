"""Rows of a table to tokens and labels: texts, words with a label each, or questions with their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .data_files import format_names
from .labels import LabelReader, pad_labels
from .questions import answer_tokens, encode_question, no_answer_position, parse_answers
from .text_tables import check_columns, find_text_columns


if TYPE_CHECKING:
    from datasets import Dataset


class RowEncoder:
    """Tokenizes rows of one or two texts, and reads the label of a classifier or an encoder-decoder.

    Args:
        tokenizer, model: as in `calibration_batches`.
        length: largest number of tokens of a row.
    """

    usual_text_columns: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Columns that are read if none are named and all of them exist, before those of `find_text_columns`."""
    usual_label_columns: ClassVar[tuple[str, ...]] = ("label", "labels")

    def __init__(self, tokenizer: Any, model: nn.Module, length: int):
        self.tokenizer, self.length = tokenizer, length
        self.labels = LabelReader(tokenizer, model, length)
        self.text_columns: tuple[str, ...] = ()
        self.label_column: str | None = None

    @property
    def _has_labels(self) -> bool:
        return self.labels.is_classifier

    def choose_columns(
        self, rows: Dataset, text_column: str | Sequence[str] | None, label_column: str | None, with_labels: bool
    ) -> list[str]:
        """Returns the names of the columns to read.

        Raises:
            ValueError: if a named column is missing, or it is not clear which column to read.
        """
        usual = (names for names in self.usual_text_columns if set(names) <= set(rows.column_names))
        self.text_columns = find_text_columns(rows, text_column or next(usual, None))
        self.label_column = self._find_label_column(rows, label_column) if with_labels else None
        return [*self.text_columns, *([self.label_column] if self.label_column else [])]

    def _find_label_column(self, rows: Dataset, requested: str | None) -> str | None:
        """Returns the name of the label column, None if the model needs no labels or the table has none."""
        if requested is not None:
            check_columns(rows, (requested,))
            return requested
        if self.labels.has_target_texts:
            raise ValueError(
                "an encoder-decoder model needs a target text for each row: name their column with `label_column` "
                f"(columns: {format_names(rows.column_names)})."
            )
        if not self._has_labels:
            return None
        return next((name for name in self.usual_label_columns if name in rows.column_names), None)

    def texts_of(self, row: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Returns the text or pair of texts of a row, None if the first is empty."""
        texts = tuple(row[name] for name in self.text_columns)
        for text in texts:
            if text is not None and not self._is_text(text):
                raise ValueError(f"a row of column {format_names(self.text_columns)} holds {text!r}: it must be text.")
        is_empty = not (texts[0].strip() if isinstance(texts[0], str) else texts[0])
        return None if is_empty else tuple(text or "" for text in texts)

    def _is_text(self, value: Any) -> bool:
        return isinstance(value, str)

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the arguments of the model for one row, in lists of one entry per token; None for an empty row.

        Raises:
            ValueError: if a text or label is of the wrong kind.
        """
        texts = self.texts_of(row)
        if texts is None:
            return None
        sample = self._encode(texts, row)
        sample.setdefault("attention_mask", [1] * len(sample["input_ids"]))
        return sample

    def _encode(self, texts: tuple[Any, ...], row: Mapping[str, Any]) -> dict[str, Any]:
        sample = dict(self.tokenizer(*texts, truncation=True, max_length=self.length))
        if self.label_column is not None:
            sample["labels"] = self.labels.read(row[self.label_column])
        return sample

    def stack_labels(self, labels: list[Any], width: int) -> torch.Tensor:
        """Stacks the labels of rows that are padded to `width` tokens."""
        return self.labels.stack(labels)


class WordEncoder(RowEncoder):
    """Tokenizes rows of words with a label each. The first token of a word has its label, the others have -100."""

    usual_text_columns = (("tokens",), ("words",))
    usual_label_columns = ("labels", "label", "ner_tags", "tags")

    @property
    def _has_labels(self) -> bool:
        return True

    def _find_label_column(self, rows: Dataset, requested: str | None) -> str | None:
        is_one_text = getattr(rows.features[self.text_columns[0]], "dtype", None) in ("string", "large_string")
        return None if is_one_text and requested is None else super()._find_label_column(rows, requested)

    def _is_text(self, value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value))

    def _encode(self, texts: tuple[Any, ...], row: Mapping[str, Any]) -> dict[str, Any]:
        words = texts[0]
        if isinstance(words, str):
            if self.label_column is not None:
                raise ValueError(
                    f"a row of column {format_names(self.text_columns)} is one text: labels of tokens need a list of "
                    "words for each row, as in the column tokens of CoNLL. Name it with `text_column`."
                )
            return super()._encode(texts, row)
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.length)
        sample = dict(encoded)
        if self.label_column is not None:
            sample["labels"] = self._token_labels(encoded, words, row[self.label_column])
        return sample

    def _token_labels(self, encoded: Any, words: list[str], labels: Any) -> list[int]:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not say which tokens belong to a word, which labels of tokens "
                "need: use a fast tokenizer, with tokenizer.json."
            )
        if not isinstance(labels, list) or len(labels) != len(words):
            raise ValueError(f"a row has {len(words)} words and the labels {labels!r}: give one for each word.")
        token_labels, previous = [], None
        for word in encoded.word_ids():
            is_first = word is not None and word != previous
            token_labels.append(self.labels.read_class(labels[word]) if is_first else -100)
            previous = word
        return token_labels

    def stack_labels(self, labels: list[Any], width: int) -> torch.Tensor:
        return pad_labels(labels, width)


class QuestionEncoder(RowEncoder):
    """Tokenizes questions with their contexts. A long context is cut to the window with the first answer.

    The labels are the first and the last token of that answer; the class token if there is none.
    """

    usual_text_columns = (("question", "context"),)
    usual_label_columns = ("answers",)

    @property
    def _has_labels(self) -> bool:
        return True

    def _find_label_column(self, rows: Dataset, requested: str | None) -> str | None:
        if len(self.text_columns) == 2:
            return super()._find_label_column(rows, requested)
        if requested is not None:
            raise ValueError(
                'answers are part of a context: name two columns, as in `text_column="question,context"` (columns: '
                f"{format_names(rows.column_names)})."
            )
        return None

    def _encode(self, texts: tuple[Any, ...], row: Mapping[str, Any]) -> dict[str, Any]:
        if len(texts) != 2:
            return super()._encode(texts, row)
        question, context = texts
        encoded, context_index = encode_question(self.tokenizer, question, context, self.length)
        num_windows = len(encoded["input_ids"])
        span, window = None, 0
        if self.label_column is not None:
            answers = parse_answers(row[self.label_column])
            spans = [answer_tokens(encoded, index, answers, context, context_index) for index in range(num_windows)]
            window = next((index for index, found in enumerate(spans) if found is not None), 0)
            span = spans[window] or (no_answer_position(self.tokenizer, encoded["input_ids"][window]),) * 2
        sample = {name: values[window] for name, values in encoded.items() if name != "overflow_to_sample_mapping"}
        return sample if span is None else sample | dict(zip(("start_positions", "end_positions"), span, strict=True))


def row_encoder(tokenizer: Any, model: nn.Module, length: int) -> RowEncoder:
    """Returns the encoder for the rows that a model reads, judged by the name of its class."""
    name = type(model).__name__
    encoders: dict[str, type[RowEncoder]] = {
        "ForTokenClassification": WordEncoder,
        "ForQuestionAnswering": QuestionEncoder,
    }
    encoder = next((encoder for head, encoder in encoders.items() if name.endswith(head)), RowEncoder)
    return encoder(tokenizer, model, length)
