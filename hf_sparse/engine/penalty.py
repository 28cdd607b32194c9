"""GroupPenalty: the penalty of one parameter group, its value and its gradients, on the shards of each rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch

from ..config import ResolvedGroup
from ..distributed import SINGLE_PROCESS, Communicator, Shard
from ..numerics import chunk_size
from ..penalties import Penalty
from ..selection.coupled_units import local_parts, row_chunks, sum_squares, unit_size
from ..selection.unit_norms import LayerUnits


class GroupPenalty(ABC):
    """The penalty of the weights of one group. All ranks that hold the weights call its methods together.

    Args:
        penalty: the term of each unit.
        options: the resolved options of the group, with its layers.
        shards: the local part of each weight by name.
        communicator: the ranks that hold the weights.
    """

    def __init__(
        self,
        penalty: Penalty,
        options: ResolvedGroup,
        shards: Mapping[str, Shard],
        communicator: Communicator = SINGLE_PROCESS,
    ):
        self.penalty, self.options, self.communicator = penalty, options, communicator
        self.shards = {layer.name: shards[layer.name] for layer in options.layers}

    @abstractmethod
    def observe(self) -> None:
        """Computes what the next `add_gradients` need of weights that other ranks hold."""

    @abstractmethod
    def add_gradients(self, strength: float) -> None:
        """Adds strength times the gradient of the penalty to the present gradients, in place, in float32. A weight
        without a gradient is left as it is: its optimizer does not step it."""

    @abstractmethod
    def local_value(self) -> torch.Tensor:
        """Returns this rank's part of the penalty, float64, for the weights as `observe` has seen them."""

    def value(self) -> float:
        """Returns the penalty of the present weights, without its strength."""
        with torch.no_grad():
            self.observe()
            total = self.local_value().reshape(1)
        self.communicator.all_reduce(total)
        return float(total)

    def _gradients(self) -> Iterator[tuple[Shard, torch.Tensor]]:
        for shard in self.shards.values():
            gradient = shard.gradient
            if gradient is not None and gradient.numel():
                yield shard, gradient


class WeightPenalty(GroupPenalty):
    """The penalty of single weights."""

    def observe(self) -> None:
        pass

    @torch.no_grad()
    def add_gradients(self, strength: float) -> None:
        for shard, gradient in self._gradients():
            for weight, part in zip(_chunks(shard.tensor), _chunks(gradient), strict=True):
                magnitudes = weight.abs().float()
                part.add_(self.penalty.slope(magnitudes, 1).mul_(weight.sign()), alpha=strength)

    def local_value(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for shard in (shard for shard in self.shards.values() if shard.is_primary):
            for weight in _chunks(shard.tensor):
                total = total.to(weight.device) + self.penalty.value(weight.abs().float(), 1).sum(dtype=torch.float64)
        return total


class UnitPenalty(GroupPenalty):
    """The penalty of units that are parts of one weight, by the pattern of the group."""

    def __init__(
        self,
        penalty: Penalty,
        options: ResolvedGroup,
        shards: Mapping[str, Shard],
        communicator: Communicator = SINGLE_PROCESS,
    ):
        super().__init__(penalty, options, shards, communicator)
        self.layers = [LayerUnits(layer, options.pattern, self.shards[layer.name]) for layer in options.layers]
        self._split: list[torch.Tensor] = []

    @torch.no_grad()
    def observe(self) -> None:
        sizes = [units.num_split for units in self.layers]
        if not any(sizes):
            return
        sums = torch.zeros(sum(sizes), dtype=torch.float64, device=self.layers[0].shard.tensor.device)
        self._split = list(sums.split(sizes))
        for units, part in zip(self.layers, self._split, strict=True):
            units.add_split_squares(part)
        self.communicator.all_reduce(sums)

    @torch.no_grad()
    def add_gradients(self, strength: float) -> None:
        for number, units in enumerate(self.layers):
            shard, gradient = units.shard, units.shard.gradient
            if gradient is None:
                continue
            for weight, part in units.whole_parts(shard.tensor, gradient):
                factors = self._factors(units.squared_norms(weight), units.size)
                part.add_(self.options.pattern.expand(factors, _shape(weight)) * weight, alpha=strength)
            if units.num_split:
                factors = self._factors(self._split[number], units.size)
                for ids, weight, part in units.split_parts(shard.tensor, gradient):
                    part.add_(factors[ids] * weight, alpha=strength)

    def local_value(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.layers[0].shard.tensor.device)
        for number, units in enumerate(self.layers):
            if units.shard.is_primary:
                for (weight,) in units.whole_parts(units.shard.tensor):
                    total += self.penalty.value(units.squared_norms(weight).sqrt(), units.size).sum()
            if units.num_split and self.communicator.rank == 0:
                total += self.penalty.value(self._split[number].sqrt(), units.size).sum()
        return total

    def _factors(self, squared_norms: torch.Tensor, size: int) -> torch.Tensor:
        return self.penalty.coefficients(squared_norms.sqrt(), size).float()


class CoupledPenalty(GroupPenalty):
    """The penalty of units that are slices of several weights: neurons, heads, layers. Biases are not counted."""

    def __init__(
        self,
        penalty: Penalty,
        options: ResolvedGroup,
        shards: Mapping[str, Shard],
        communicator: Communicator = SINGLE_PROCESS,
    ):
        super().__init__(penalty, options, shards, communicator)
        shapes = {layer.name: layer.shape for layer in options.layers}
        self.sizes = [unit_size(group, shapes) for group in options.units]
        self._squares: list[torch.Tensor] = []

    @torch.no_grad()
    def observe(self) -> None:
        sums = sum_squares(self.options.units, self.shards)
        self.communicator.all_reduce(sums)
        self._squares = list(sums.split([group.num_units for group in self.options.units]))

    @torch.no_grad()
    def add_gradients(self, strength: float) -> None:
        gradients = {name: shard.gradient for name, shard in self.shards.items()}
        for group, squares, size in zip(self.options.units, self._squares, self.sizes, strict=True):
            factors = self.penalty.coefficients(squares.sqrt(), size).float()
            for part in group.slices:
                shard, gradient = self.shards.get(part.name), gradients.get(part.name)
                if shard is None or gradient is None:
                    continue
                by_index = factors.to(gradient.device).repeat_interleave(part.width)
                for region, views in local_parts(part, group.num_units, shard, [shard.tensor, gradient]):
                    for chunk, (weight, entries) in row_chunks(region, views):
                        first, stop = chunk.start[part.dim] - part.offset, chunk.stop[part.dim] - part.offset
                        shape = [-1 if dim == part.dim else 1 for dim in range(weight.ndim)]
                        entries.add_(by_index[first:stop].view(shape) * weight, alpha=strength)

    def local_value(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._squares[0].device)
        if self.communicator.rank == 0:
            for squares, size in zip(self._squares, self.sizes, strict=True):
                total += self.penalty.value(squares.sqrt(), size).sum()
        return total


def new_group_penalty(
    penalty: Penalty, options: ResolvedGroup, shards: Mapping[str, Shard], communicator: Communicator = SINGLE_PROCESS
) -> GroupPenalty:
    """Returns the penalty of a group of layers or of coupled units."""
    kind: type[GroupPenalty] = CoupledPenalty if options.units else UnitPenalty
    if not penalty.by_unit or (not options.units and _has_single_weights(options)):
        kind = WeightPenalty
    return kind(penalty, options, shards, communicator)


def _has_single_weights(options: ResolvedGroup) -> bool:
    shapes = {layer.matrix_shape for layer in options.layers}
    return all(options.pattern.unit_shape(shape) == shape for shape in shapes)


def _shape(matrix_RPC: torch.Tensor) -> tuple[int, int, int]:
    rows, positions, columns = matrix_RPC.shape
    return rows, positions, columns


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields views of a tensor that fit into a core's cache, whatever its strides."""
    if not tensor.numel():
        return
    rows = tensor if tensor.ndim else tensor.view(1)
    yield from rows.split(max(1, chunk_size(tensor.device) * len(rows) // rows.numel()))
