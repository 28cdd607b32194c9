"""Prunes coupled units: selects them, zeros the parameters that produce them, and solves the matrices that read them.

Shapes: R output rows, C inputs of a reading matrix; U units; T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..distributed import Shard
from ..engine.coupled_group import CoupledParameterGroup, keep_masks
from ..engine.masks import MaskStore
from ..model.blocks import is_within
from ..model.coupling import UnitGroup
from ..requires import Requires
from ..selection.coupled_units import prune_units
from ..solvers import PruneRequest
from ..statistics import WeightedGram, WeightedInputs
from .observers import InputObserver, fill_unreached
from .unit_scores import UnitReader, find_unit_readers, score_by_inputs
from .unit_selection import UnitSelection


class UnitPruner:
    """Prunes coupled units in place, each group of units by itself.

    Args:
        model: the model.
        groups: the parameter groups of coupled units.
        selection: what was selected before, and how many units are to be selected here.
        on_unreached: see `fill_unreached`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[CoupledParameterGroup],
        selection: UnitSelection,
        on_unreached: str,
    ):
        self._model, self._readers = model, find_unit_readers(groups)
        self._selection, self._on_unreached = selection, on_unreached

    def prune_observed(self, observers: Sequence[InputObserver], block: str | None) -> dict[str, float]:
        """Prunes the units that the matrices of these observers read.

        Args:
            observers: of reading matrices. Their statistics and samples are released.
            block: name of the block outside of which nothing is zeroed; None for the whole model.

        Returns:
            The relative squared error of the outputs on the sampled tokens, by the name of the reading weight.

        Raises:
            ValueError: no token has reached a matrix, or its statistic is not fit for the criterion or solver.
        """
        fill_unreached(observers, self._on_unreached)
        errors: dict[str, list[float]] = {}
        pruned: dict[UnitGroup, torch.Tensor] = {}
        for observer in observers:
            (layer,) = observer.layers
            reader, statistic = self._readers[layer.name, observer.expert], observer.statistic
            if not isinstance(statistic, WeightedInputs):
                raise TypeError(f'the inputs of "{observer.name}" have not been weighted by the outputs')
            weight_RC = reader.matrix(self._model.get_parameter(layer.name).detach())
            keep_U = self._selection.keep.get(reader.units)
            try:
                keep_U = self._select(reader, weight_RC, statistic) if keep_U is None else keep_U
                change = self._solve(reader, weight_RC, keep_U, statistic, observer.sample)
            except ValueError as error:
                raise ValueError(f'inputs of "{observer.name}": {error}') from error
            errors.setdefault(layer.name, []).append(change)
            pruned[reader.units] = keep_U
            observer.release_statistic()
            observer.sample = None
        self._zero(pruned, block)
        return {name: sum(values) / len(values) for name, values in errors.items()}

    def prune_selected(self, group: CoupledParameterGroup, block: str | None = None) -> None:
        """Zeros units that were selected before, without a solver: their parts in a block, or all."""
        self._zero({units: self._selection.keep[units] for units in group.units}, block)

    def _select(self, reader: UnitReader, weight_RC: torch.Tensor, statistic: WeightedInputs) -> torch.Tensor:
        criterion, count = reader.criterion, self._selection.counts[reader.units]
        has_bias = reader.bias(self._model) is not None
        scores_U = score_by_inputs(criterion, weight_RC, statistic, reader.part.width, has_bias, count)
        if bool(scores_U.isnan().any()):
            raise ValueError(f'scores of criterion "{reader.group.options.criterion_name}" are nan')
        locked_U = self._selection.locked.get(reader.units)
        if locked_U is not None:
            scores_U = scores_U.masked_fill(locked_U, -torch.inf)
        (keep_U,) = keep_masks([scores_U], count, [count], [count])
        return keep_U

    def _solve(
        self,
        reader: UnitReader,
        weight_RC: torch.Tensor,
        keep_U: torch.Tensor,
        statistic: WeightedInputs,
        x_TC: torch.Tensor | None,
    ) -> float:
        """Solves a reading matrix, in place. Returns the relative squared error of its outputs on the sample."""
        solver, bias_R = reader.group.options.solver, reader.bias(self._model)
        mask_RC = keep_U.to(weight_RC.device).repeat_interleave(reader.part.width).expand(weight_RC.shape).contiguous()
        if reader.group.options.keep_zeros:
            mask_RC &= weight_RC != 0
        before = weight_RC.clone(), None if bias_R is None else bias_R.clone()
        if not solver.requires & Requires.GRAM:
            new_RC, _ = solver.solve(weight_RC, mask_RC=mask_RC)
        elif not isinstance(statistic, WeightedGram):
            raise TypeError("the solver requires the Gram matrix of the inputs")
        elif solver.solves_bias and bias_R is not None:
            always_R1 = torch.ones_like(mask_RC[:, :1])
            request = PruneRequest(torch.cat([weight_RC, bias_R[:, None]], 1), torch.cat([mask_RC, always_R1], 1))
            ((solved, _),) = solver.solve_batched([request], statistic)
            new_RC = solved[:, :-1]
            bias_R.copy_(solved[:, -1])
        else:
            gram = statistic if solver.solves_bias else statistic.without_bias()
            ((new_RC, _),) = solver.solve_batched([PruneRequest(weight_RC, mask_RC)], solver.prepare(gram))
            dead_C = statistic.norms == 0
            new_RC = torch.where(mask_RC & dead_C, weight_RC, new_RC)
        weight_RC.copy_(new_RC)
        return _output_error(before, (weight_RC, bias_R), x_TC)

    def _zero(self, keep: Mapping[UnitGroup, torch.Tensor], block: str | None) -> None:
        """Zeros the parameters of pruned units, those in a block or all."""
        names = dict.fromkeys(
            name for units in keep for name in units.parameters if block is None or is_within(name, block)
        )
        parameters = {name: self._model.get_parameter(name).detach() for name in names}
        masks = MaskStore({name: (parameter.shape, parameter.device) for name, parameter in parameters.items()})
        shards = {name: Shard(parameter) for name, parameter in parameters.items()}
        bits = {name: masks.bits(name) for name in names}
        for units, keep_U in keep.items():
            prune_units(units, keep_U, shards, bits)
        masks.enforce(parameters)


def _output_error(
    old: tuple[torch.Tensor, torch.Tensor | None],
    new: tuple[torch.Tensor, torch.Tensor | None],
    x_TC: torch.Tensor | None,
) -> float:
    """The squared norm of the change of the outputs as a share of that of the outputs."""
    if x_TC is None:
        return 0.0
    before, after = (
        nn.functional.linear(x_TC, weight.float(), None if bias is None else bias.float())
        for weight, bias in (old, new)
    )
    size = float(before.square().sum())
    return float((before - after).square().sum()) / size if size else 0.0
