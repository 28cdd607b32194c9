"""ModelMetric: what is measured of the models of one kind."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..calibration.batches import call_model


class ModelMetric(ABC):
    """Base class of evaluation metrics. Each is for one kind of models, such as classifiers.

    Each batch is measured on one rank. The measurements are gathered in the order of the batches, and every rank
    computes the values from all of them, so that the number of ranks changes no value.
    """

    name: ClassVar[str]
    """For messages, as in "accuracy"."""
    models: ClassVar[str]
    """The kind of models, as in "classifiers"."""
    columns: ClassVar[int]
    """Numbers in a row of measurements."""
    labels: ClassVar[tuple[str, ...]] = ()
    """Names in a batch that must be there beside the inputs."""
    label_remedy: ClassVar[str] = "name the `label_column` of the data"
    needs_reference: ClassVar[bool] = False
    """Whether a model is compared with the outputs of the dense model."""

    @abstractmethod
    def fits(self, model: nn.Module) -> bool:
        """Whether the models of this kind include `model`."""

    def check(self, model: nn.Module, batch: Any) -> None:
        """Checks a batch before any is measured.

        Raises:
            ValueError: if the batch lacks labels, or has wrong ones.
        """
        missing = [name for name in self.labels if not isinstance(batch, Mapping) or name not in batch]
        if missing:
            raise ValueError(f"{self.name} of {self.models} needs {' and '.join(missing)}: {self.label_remedy}.")

    @abstractmethod
    def measure(self, model: nn.Module, batch: Any, reference: torch.Tensor | None) -> torch.Tensor:
        """Returns one row (B, `columns`) of measurements for each row of a batch, which is on the model's device."""

    @abstractmethod
    def summarize(self, rows: np.ndarray) -> dict[str, float]:
        """Computes the values from the measurements (N, `columns`), float64, of all batches."""


def has_head(model: nn.Module, *heads: str) -> bool:
    """Whether the name of a model's class has one of these heads, as "ForCausalLM" in LlamaForCausalLM."""
    return any(head in type(model).__name__ for head in heads)


def has_no_head(model: nn.Module) -> bool:
    """Whether the name of a model's class has no task in it.

    Example:
        >>> from transformers import BertForMaskedLM, RoFormerModel
        >>> BertForMaskedLM.__name__, RoFormerModel.__name__
        ('BertForMaskedLM', 'RoFormerModel')
        >>> [has_no_head(cls.__new__(cls)) for cls in (BertForMaskedLM, RoFormerModel)]
        [False, True]
    """
    return re.search(r"For[A-Z]|LMHead", type(model).__name__) is None


def config_value(model: nn.Module, name: str, default: Any = None) -> Any:
    """Returns a value of a model's config, `default` if there is none."""
    return getattr(getattr(model, "config", None), name, default)


def logits_of(model: nn.Module, batch: Mapping[str, Any], without: tuple[str, ...] = ("labels",)) -> torch.Tensor:
    """Returns the logits of a model for a batch without its labels."""
    return call_model(model, {name: value for name, value in batch.items() if name not in without}).logits
