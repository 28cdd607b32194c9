"""Labels: what a model's loss asks for beside the inputs."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn

from .data_files import quoted
from .text_rows import check_names


LABEL_COLUMNS = ("label", "labels")


class Labels:
    """Of one kind of model: classes, or the target texts of an encoder with a decoder."""

    def __init__(self, tokenizer: Any, model: nn.Module, length: int):
        self._tokenizer, self._length = tokenizer, length
        self._config = getattr(model, "config", None)
        self.are_texts = bool(getattr(self._config, "is_encoder_decoder", False))
        self._of_classes = type(model).__name__.endswith("ForSequenceClassification")

    def column(self, rows: Dataset, name: str | None) -> str | None:
        """The column that holds them, None if there are none.

        Raises:
            ValueError: the data lack it.
        """
        if name is not None:
            check_names(rows, (name,))
            return name
        if self.are_texts and not self._of_classes:
            raise ValueError(
                f"an encoder with a decoder needs a target text for each row: name its label_column, out of "
                f"{quoted(rows.column_names)}."
            )
        return next((name for name in LABEL_COLUMNS if name in rows.column_names), None) if self._of_classes else None

    def read(self, value: Any) -> Any:
        """One row's label: a number, or token ids."""
        known = {name: number for number, name in (getattr(self._config, "id2label", None) or {}).items()}
        if isinstance(value, str) and self.are_texts and not self._of_classes:
            return self._tokenizer(text_target=value, truncation=True, max_length=self._length)["input_ids"]
        if isinstance(value, str) and value in known:
            return known[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"a row has the label {value!r}: it must be a number, or one of {quoted(known)}.")
        if self._of_classes and isinstance(value, int) and not 0 <= value < max(2, self._config.num_labels):
            raise ValueError(f"a row has the label {value}: the model knows 0 to {self._config.num_labels - 1}.")
        return value

    def stack(self, labels: list[Any]) -> torch.Tensor:
        """One tensor; token ids are padded with -100."""
        if not isinstance(labels[0], list):
            return torch.tensor(labels)
        width = max(map(len, labels))
        return torch.tensor([ids + [-100] * (width - len(ids)) for ids in labels])
