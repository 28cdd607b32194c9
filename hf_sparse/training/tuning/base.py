"""Base class of tunings: which few parameters are trained after pruning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn

from ...methods import MethodRegistry
from ...model.layers import PrunableLayer


class Tuning(ABC):
    """Chooses the parameters of a pruned model that training changes; all others are frozen.

    A subclass is registered with `register_tune`; when it is a frozen dataclass, its fields are its options
    (`tune_kwargs`).
    """

    updates_weights: ClassVar[bool] = False
    """Whether `new_update` returns modules."""

    @abstractmethod
    def trained_parameters(self, model: nn.Module) -> set[str]:
        """Returns the names of the parameters that the optimizer updates as they are.

        Args:
            model: the model to train, before it is wrapped.
        """

    def new_update(self, layer: PrunableLayer, generator: torch.Generator) -> nn.Module | None:
        """Returns the trained change of a selected weight; None to leave the weight as it is.

        The weight is W0 + M * update(), where W0 is its value at the start and M its mask, and is written after each
        optimizer step. The optimizer updates the parameters of the module, by the gradient that follows from that of
        the weight.

        Args:
            layer: the weight.
            generator: for random initial values, the same on every rank.

        Returns:
            A module without arguments of `forward`, which returns a float32 tensor of the weight's shape, zero at the
            start.
        """
        return None


TUNINGS = MethodRegistry("tune", Tuning)
register_tune = TUNINGS.register
