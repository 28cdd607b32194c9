"""Labels that a model's loss needs beside its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .data_files import format_names


class LabelReader:
    """Reads labels: class numbers or names, several for each row, numbers to regress on, or an encoder-decoder's
    target texts.

    `length` is the largest number of tokens of a target text.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, length: int):
        self._tokenizer, self._length = tokenizer, length
        self._config: Any = getattr(model, "config", None)
        self._num_labels: int = getattr(self._config, "num_labels", 0)
        self.is_classifier = type(model).__name__.endswith("ForSequenceClassification")
        self.has_target_texts = bool(getattr(self._config, "is_encoder_decoder", False)) and not self.is_classifier
        problem_type = getattr(self._config, "problem_type", None) if self.is_classifier else None
        self._is_multi_label = problem_type == "multi_label_classification"
        self._is_regression = self.is_classifier and (
            problem_type == "regression" or (problem_type is None and self._num_labels == 1)
        )

    def read(self, value: Any) -> Any:
        """Converts the label of one row to a number, to a list of numbers, or to token ids.

        Raises:
            ValueError: if it is none that the model can have.
        """
        if isinstance(value, str) and self.has_target_texts:
            return self._tokenizer(text_target=value, truncation=True, max_length=self._length)["input_ids"]
        if self._is_multi_label:
            return self._read_several(value)
        if self._is_regression:
            return self._read_numbers(value)
        return self.read_class(value)

    def read_class(self, value: Any) -> Any:
        """Converts a class number or name to a number."""
        class_ids = self._class_ids()
        if isinstance(value, str) and value in class_ids:
            return class_ids[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"a row has the label {value!r}: it must be a number, or one of {format_names(class_ids)}."
            )
        if self.is_classifier and isinstance(value, int) and not 0 <= value < max(2, self._num_labels):
            raise ValueError(f"a row has the label {value}: it must be from 0 to {self._num_labels - 1}.")
        return value

    def _read_several(self, value: Any) -> list[float]:
        """Converts a list of class names, or of one zero or one for each class, to the latter."""
        class_ids = self._class_ids()
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(item, str) and item in class_ids for item in values):
            present = {class_ids[name] for name in values}
            return [float(number in present) for number in range(self._num_labels)]
        if len(values) != self._num_labels or any(item not in (0, 1) for item in values):
            raise ValueError(
                f"a row has the labels {value!r}: they must be {self._num_labels} zeros or ones, or a list of names "
                f"from {format_names(class_ids)}."
            )
        return [float(item) for item in values]

    def _read_numbers(self, value: Any) -> Any:
        """Converts a number to regress on, or one for each output of the model, to floats."""
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = [float(item) for item in values if isinstance(item, (int, float)) and not isinstance(item, bool)]
        if len(numbers) != len(values) or len(numbers) != self._num_labels:
            needed = "a number" if self._num_labels == 1 else f"a list of {self._num_labels} numbers"
            raise ValueError(f"a row has the label {value!r}: it must be {needed}.")
        return numbers[0] if self._num_labels == 1 else numbers

    def _class_ids(self) -> dict[str, int]:
        return {name: int(number) for number, name in (getattr(self._config, "id2label", None) or {}).items()}

    def stack(self, labels: list[Any]) -> torch.Tensor:
        """Stacks the labels of a batch to one tensor. Token ids are padded with -100, which the loss ignores."""
        return pad_labels(labels, max(map(len, labels))) if isinstance(labels[0], list) else torch.tensor(labels)


def pad_labels(labels: list[list[Any]], width: int) -> torch.Tensor:
    """Pads lists with -100 to one tensor.

    Example:
        >>> pad_labels([[7], [8, 9]], 3)
        tensor([[   7, -100, -100],
                [   8,    9, -100]])
    """
    return torch.tensor([row + [-100] * (width - len(row)) for row in labels])
