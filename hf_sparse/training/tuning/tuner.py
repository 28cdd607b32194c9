"""Tuner: the trained parameters and weight updates of one training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...engine.masks import MaskStore
from ...model.layers import PrunableLayer
from .base import TUNINGS, Tuning
from .state_file import TuningState, write_tuning_file


class Tuner:
    """Freezes what a tuning does not train, and computes weights from their updates.

    The order of calls: `prepare` before the optimizer is made, `start` when masks are known, then for each optimizer
    step `backward` before and `write` after it, and `release` at the end.

    Args:
        tuning: what is trained.
        layers: the selected weights.
        seed: of the initial values of updates.

    Attributes:
        updates: weight name -> module that computes its change.
        num_trained: the number of trained values, those of updates included.
        num_parameters: the number of parameters of the model.
    """

    def __init__(self, tuning: Tuning, layers: Sequence[PrunableLayer], seed: int):
        self.tuning, self.layers, self.seed = tuning, layers, seed
        self.updates: dict[str, nn.Module] = {}
        self.num_trained = self.num_parameters = 0
        self._model: nn.Module | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._start: dict[str, torch.Tensor] = {}
        self._was_trained: dict[str, bool] = {}

    @property
    def description(self) -> str:
        """The tuning with its options, and how much is trained."""
        name = TUNINGS.name_and_options(self.tuning)[0]
        options: dict[str, Any] = asdict(cast(Any, self.tuning)) if is_dataclass(self.tuning) else {}
        text = ", ".join(f"{option}={json.dumps(value)}" for option, value in options.items())
        share = self.num_trained / max(self.num_parameters, 1)
        return (
            f"{name}{f' ({text})' if text else ''}: {self.num_trained:,} values trained, {share:.2%} of "
            f"{self.num_parameters:,} parameters"
        )

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Makes the updates, and freezes all parameters except those that are trained and the weights with updates,
        whose gradients are needed. Frozen parameters stay frozen.

        Returns:
            The parameters of the updates, for the optimizer; [] if the model is prepared already.

        Raises:
            ValueError: nothing is trained.
        """
        if self._model is model:
            return []
        self._model, parameters = model, dict(model.named_parameters())
        self._was_trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
        allowed = {name for name, trained in self._was_trained.items() if trained}
        trained = self.tuning.trained_parameters(model) & allowed
        generator = torch.Generator().manual_seed(self.seed)
        self.updates = {}
        for layer in self.layers:
            update = self.tuning.new_update(layer, generator)
            if update is not None and layer.name in allowed - trained:
                self.updates[layer.name] = update.to(parameters[layer.name].device)
        if not trained and not self.updates:
            raise ValueError(nothing_trained(self.tuning, model))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained or name in self.updates)
        self._weights = {name: parameters[name] for name in self.updates}
        added = [parameter for update in self.updates.values() for parameter in update.parameters()]
        self.num_parameters = sum(parameter.numel() for parameter in parameters.values())
        self.num_trained = sum(parameters[name].numel() for name in trained) + sum(value.numel() for value in added)
        return added

    def start(self, state: TuningState | None) -> None:
        """Takes the weights as they are for their values at the start, unless they were taken before; or all values
        from a checkpoint.

        Raises:
            ValueError: those of the checkpoint are missing, or of other weights.
        """
        if state is not None:
            self._load(state)
        elif not self._start:
            self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def backward(self, masks: MaskStore) -> None:
        """Computes the gradients of the updates from those of the weights, which are then removed, so that the
        optimizer leaves the weights alone."""
        for name, update in self.updates.items():
            weight, parameters = self._weights[name], list(update.parameters())
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                continue
            gradient.masked_fill_(masks.bits(name) == 0, 0)
            with torch.enable_grad():
                gradients = torch.autograd.grad(update(), parameters, gradient.float())
            for parameter, value in zip(parameters, gradients, strict=True):
                parameter.grad = value

    @torch.no_grad()
    def write(self) -> None:
        """Computes the weights from their values at the start and the updates. Masks must be enforced afterwards."""
        for name, update in self.updates.items():
            change = update()  # float32, to which 16-bit weights are promoted
            self._weights[name].copy_(self._start[name] + change)
            for parameter in update.parameters():
                parameter.grad = None

    def release(self, model: nn.Module) -> None:
        """Unfreezes what `prepare` has frozen, and drops the updates, which the weights contain."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._was_trained.get(name, parameter.requires_grad))
            if name in self.updates:
                parameter.grad = None
        self.updates, self._weights, self._start, self._model = {}, {}, {}, None

    def save(self, directory: str | Path, step: int) -> None:
        """Writes the tuning file of a checkpoint."""
        write_tuning_file(directory, self.tuning, dict(self._tensors()), step)

    def _tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        for name, update in self.updates.items():
            yield f"start/{name}", self._start[name]
            for key, value in update.state_dict().items():
                yield f"update/{name}/{key}", value

    @torch.no_grad()
    def _load(self, state: TuningState) -> None:
        self._start = {name: state.tensor(f"start/{name}", weight) for name, weight in self._weights.items()}
        for name, update in self.updates.items():
            saved = {key: state.tensor(f"update/{name}/{key}", value) for key, value in update.state_dict().items()}
            update.load_state_dict(saved)


def nothing_trained(tuning: Tuning, model: nn.Module) -> str:
    """Returns the error of a tuning that finds nothing to train."""
    name = TUNINGS.name_and_options(tuning)[0]
    others = " or ".join(f'`tune="{other}"`' for other in TUNINGS.names() if other != name)
    return f'`tune` is "{name}", but {type(model).__name__} has no such parameters that are not frozen: use {others}.'
