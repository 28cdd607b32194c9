"""Scores of coupled units, by the inputs of the matrices that read them or by the gradients of unit masks.

Shapes: R output rows, C inputs of a reading matrix; U units; B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..criteria import Criterion, GradientCriterion, UnitCriterion
from ..engine.coupled_group import CoupledParameterGroup
from ..model.coupling import UnitGroup, UnitSlice
from ..model.layers import PrunableLayer
from ..requires import Requires
from ..statistics import GradientStatistic, WeightedGram, WeightedInputs


@dataclass(frozen=True, eq=False)
class UnitReader:
    """A matrix that reads the units of a group.

    Args:
        group: the parameter group.
        units: the coupled units.
        part: which columns of the matrix belong to each unit.
        layer: the weight that holds the matrix.
    """

    group: CoupledParameterGroup
    units: UnitGroup
    part: UnitSlice
    layer: PrunableLayer

    @property
    def criterion(self) -> Criterion:
        """The criterion of the units, which no solver selects."""
        if self.group.criterion is None:
            raise ValueError(f'group "{self.group.name}" has no criterion')
        return self.group.criterion

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the matrix (R, C), a view of the weight."""
        return self.layer.matrices(weight)[self.part.expert or 0][:, 0]

    def bias(self, model: nn.Module) -> torch.Tensor | None:
        """Returns the bias (R) of the matrix, a view of the parameter; None if there is none."""
        path, _, leaf = self.layer.name.rpartition(".")
        name = "bias" if self.part.expert is None else f"{leaf}_bias"
        bias = getattr(model.get_submodule(path), name, None)
        if not isinstance(bias, torch.Tensor):
            return None
        return bias.detach() if self.part.expert is None else bias.detach()[self.part.expert]

    def bias_name(self, model: nn.Module) -> str | None:
        """Returns the name of the parameter that holds the bias of the matrix; None if there is none."""
        if self.bias(model) is None:
            return None
        return f"{self.layer.module}.bias" if self.part.expert is None else f"{self.layer.name}_bias"

    def outputs(self, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns the function from inputs (..., C) of the matrix to its outputs (..., R)."""

        def compute(x: torch.Tensor) -> torch.Tensor:
            weight_RC = self.matrix(model.get_parameter(self.layer.name).detach())
            return nn.functional.linear(x, weight_RC, self.bias(model))

        return compute


def find_unit_readers(groups: Sequence[CoupledParameterGroup]) -> dict[tuple[str, int | None], UnitReader]:
    """Maps the name of a weight and the number of its expert, or None, to the reader that it holds."""
    readers = {}
    for group in groups:
        layers = {layer.name: layer for layer in group.layers}
        for units in group.units:
            for part in units.readers:
                readers[part.name, part.expert] = UnitReader(group, units, part, layers[part.name])
    return readers


def score_by_inputs(
    criterion: Criterion,
    weight_RC: torch.Tensor,
    statistic: WeightedInputs,
    width: int,
    has_bias: bool,
    count: int | None,
) -> torch.Tensor:
    """Returns the scores (U) of the units of a reading matrix, float32 on the CPU: the sum over the unit's columns.

    Args:
        criterion: requires norms, variances or the Gram matrix of the inputs.
        weight_RC: the matrix.
        statistic: of its inputs.
        width: columns of a unit.
        has_bias: whether the layer has a bias that can take over the mean of what is pruned.
        count: see `UnitCriterion.score_units`.
    """
    if isinstance(criterion, UnitCriterion):
        if not isinstance(statistic, WeightedGram):
            raise TypeError("the criterion requires the Gram matrix of the inputs")
        gram_CC = statistic.centered_matrix() if has_bias else statistic.matrix_without_bias()
        return criterion.score_units(weight_RC, gram_CC, width, count).float().cpu()
    values_C = statistic.variances if criterion.requires & Requires.INPUT_VARIANCES else statistic.norms
    statistic_RC = criterion.prepare_statistic(weight_RC, values_C.to(weight_RC.device))
    scores_RC = criterion.score(weight_RC, statistic_RC)
    return scores_RC.sum(0, dtype=torch.float64).view(-1, width).sum(1).float().cpu()


class UnitMaskGradients:
    """Sums the saliency of unit masks, which are all 1, over the rows of calibration batches.

    The gradient of the mask of a unit is that of the loss when the unit's inputs to the matrices that read it are
    multiplied by it: for criterion taylor, the squared gradients of the masks.

    A context manager: inside, forwards with gradients are observed, and `step` ends each batch after its backward.

    Args:
        model: the model that runs.
        groups: coupled units with a gradient criterion.

    Reference: Michel et al., "Are Sixteen Heads Really Better than One?", 2019, eq. 3; Kwon et al., "A Fast
    Post-Training Pruning Framework for Transformers", 2022, eq. 7.
    """

    def __init__(self, model: nn.Module, groups: Sequence[CoupledParameterGroup]):
        self._model, self._readers = model, find_unit_readers(groups)
        self._masks: dict[tuple[str, int | None], list[torch.Tensor]] = {}
        self.statistics: dict[UnitGroup, GradientStatistic] = {}
        for reader in self._readers.values():
            ones = torch.ones(reader.units.num_units)
            self.statistics[reader.units] = GradientStatistic(ones, 1.0)

    def __enter__(self) -> UnitMaskGradients:
        self._handles = ExitStack()
        for key, reader in self._readers.items():
            module = self._model.get_submodule(reader.layer.module)
            self._handles.enter_context(module.register_forward_pre_hook(self._hook(key), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()

    def _hook(self, key: tuple[str, int | None]) -> Callable:
        def multiply(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple:
            x = args[0]
            rows = x.shape[0] if x.ndim > 2 else 1  # tokens of flattened inputs belong to no row
            mask = torch.ones((rows, *[1] * (x.ndim - 2), x.shape[-1]), dtype=x.dtype, device=x.device)
            self._masks.setdefault(key, []).append(mask.requires_grad_())
            return (x * mask, *args[1:]), kwargs

        return multiply

    def step(self) -> None:
        """Adds the gradients of one batch, after its backward.

        Raises:
            ValueError: a gradient is inf or nan.
        """
        gradients: dict[UnitGroup, torch.Tensor] = {}
        criteria = {reader.units: reader.criterion for reader in self._readers.values()}
        for key, masks in self._masks.items():
            reader = self._readers[key]
            for gradient in (mask.grad for mask in masks if mask.grad is not None):
                grad_BU = gradient.float().flatten(0, -2).view(-1, reader.units.num_units, reader.part.width).sum(2)
                total = gradients.get(reader.units)
                gradients[reader.units] = grad_BU if total is None else total + grad_BU
        self._masks.clear()
        for units, grad_BU in gradients.items():
            if not bool(torch.isfinite(grad_BU).all()):
                raise ValueError(f'gradients of the units of "{units.name}" are inf or nan')
            criterion = criteria[units]
            if isinstance(criterion, GradientCriterion):
                for gradient_U in grad_BU.cpu():
                    self.statistics[units].observe(torch.ones_like(gradient_U), gradient_U, criterion.saliency)

    def scores(self) -> dict[UnitGroup, torch.Tensor]:
        """Returns the scores (U) of the units of each group of units."""
        criteria = {reader.units: reader.criterion for reader in self._readers.values()}
        return {
            units: criteria[units].score(torch.ones_like(statistic.total), statistic.total)
            for units, statistic in self.statistics.items()
        }
