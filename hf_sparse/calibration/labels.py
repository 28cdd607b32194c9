"""Labels that a model's loss needs beside its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .data_files import format_names
from .text_tables import check_columns


if TYPE_CHECKING:
    from datasets import Dataset


LABEL_COLUMNS = ("label", "labels")


class LabelReader:
    """Reads labels from a table: class numbers or names, numbers to regress on, or an encoder-decoder's target texts.

    `length` is the largest number of tokens of a target text.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, length: int):
        self._tokenizer, self._length = tokenizer, length
        self._config: Any = getattr(model, "config", None)
        self._is_classifier = type(model).__name__.endswith("ForSequenceClassification")
        self._has_target_texts = bool(getattr(self._config, "is_encoder_decoder", False)) and not self._is_classifier

    def find_column(self, rows: Dataset, requested: str | None) -> str | None:
        """Returns the name of the label column, None if the model needs no labels or the table has none.

        Raises:
            ValueError: if the requested column is missing, or an encoder-decoder's is not named.
        """
        if requested is not None:
            check_columns(rows, (requested,))
            return requested
        if self._has_target_texts:
            raise ValueError(
                "an encoder-decoder model needs a target text for each row: name their column with label_column "
                f"(columns: {format_names(rows.column_names)})."
            )
        if not self._is_classifier:
            return None
        return next((name for name in LABEL_COLUMNS if name in rows.column_names), None)

    def read(self, value: Any) -> Any:
        """Converts the label of one row to a number, or to token ids.

        Raises:
            ValueError: if it is neither a number in the model's range nor the name of one of its classes.
        """
        if isinstance(value, str) and self._has_target_texts:
            return self._tokenizer(text_target=value, truncation=True, max_length=self._length)["input_ids"]
        class_ids = {name: number for number, name in (getattr(self._config, "id2label", None) or {}).items()}
        if isinstance(value, str) and value in class_ids:
            return class_ids[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"a row has the label {value!r}: it must be a number, or one of {format_names(class_ids)}."
            )
        if self._is_classifier and isinstance(value, int) and not 0 <= value < max(2, self._config.num_labels):
            raise ValueError(f"a row has the label {value}: it must be from 0 to {self._config.num_labels - 1}.")
        return value

    def stack(self, labels: list[Any]) -> torch.Tensor:
        """Stacks the labels of a batch to one tensor. Token ids are padded with -100, which the loss ignores."""
        if not isinstance(labels[0], list):
            return torch.tensor(labels)
        width = max(map(len, labels))
        return torch.tensor([ids + [-100] * (width - len(ids)) for ids in labels])
