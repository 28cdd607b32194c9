"""Which entries of each parameter remain in a smaller model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..model.coupling import UnitGroup, UnitSlice


class KeptEntries:
    """The indices of each dimension of the parameters that remain.

    Args:
        shapes: name of a parameter -> its shape.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = dict(shapes)
        self._masks: dict[str, dict[int, torch.Tensor]] = {}  # bool, (size) or, of fused experts, (experts, size)
        self._experts: dict[str, torch.Tensor] = {}

    def remove_units(self, group: UnitGroup, units: torch.Tensor) -> None:
        """Removes units (n), int64, of a group."""
        for part in (*group.slices, *group.attached):
            mask = self._mask(part)
            indices = part.indices(units)
            if part.expert is None:
                mask[..., indices] = False
            else:
                mask[part.expert, indices] = False

    def _mask(self, part: UnitSlice) -> torch.Tensor:
        shape = self._shapes[part.name]
        masks = self._masks.setdefault(part.name, {})
        if part.dim not in masks:
            size = (shape[part.dim],) if part.expert is None else (shape[0], shape[part.dim])
            masks[part.dim] = torch.ones(size, dtype=torch.bool)
        return masks[part.dim]

    def keep_experts(self, name: str, experts: torch.Tensor) -> None:
        """Keeps only the `experts` (n), int64, along dimension 0 of a parameter."""
        self._experts[name] = experts

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of what remains of a parameter."""
        shape = list(self._shapes[name])
        for dim, mask in self._kept_masks(name).items():
            shape[dim] = int(mask.sum(dim=-1).max())
        if name in self._experts:
            shape[0] = len(self._experts[name])
        return tuple(shape)

    def select(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what remains of a parameter: a new tensor, contiguous, on the same device."""
        whole = tensor
        if name in self._experts:
            tensor = tensor.index_select(0, self._experts[name].to(tensor.device))
        for dim, mask in self._kept_masks(name).items():
            if mask.ndim == 1:
                tensor = tensor.index_select(dim, mask.nonzero().flatten().to(tensor.device))
            else:
                rows = zip(tensor, mask.to(tensor.device), strict=True)
                tensor = torch.stack([row.index_select(dim - 1, own.nonzero().flatten()) for row, own in rows])
        return tensor.clone(memory_format=torch.contiguous_format) if tensor is whole else tensor.contiguous()

    def _kept_masks(self, name: str) -> dict[int, torch.Tensor]:
        experts = self._experts.get(name)
        masks = self._masks.get(name, {})
        return {dim: mask if mask.ndim == 1 or experts is None else mask[experts] for dim, mask in masks.items()}


def find_zero_units(group: UnitGroup, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns which units (num_units), bool, change nothing in the outputs of the model.

    These are units with zeros in all that reads them. Heads and the neurons of gated FFNs also change nothing where
    all that produces them is zero, biases included: their value is zero, as a product with a zero. Without a gate that
    depends on the activation function. A whole block changes nothing if all that it adds to the residual stream is
    zero.

    Args:
        group: of any kind.
        parameters: by name.
    """
    if not group.readers:
        return ~_is_used(group, group.slices, parameters)
    is_zero = ~_is_used(group, group.readers, parameters)
    producers = [part for part in group.slices if not part.reads]
    matrices = [part for part in producers if parameters[part.name].ndim - (part.expert is not None) > 1]
    if group.kind == "head" or len(matrices) > 1:
        is_zero |= ~_is_used(group, producers, parameters)
    return is_zero


def _is_used(group: UnitGroup, parts: Sequence[UnitSlice], parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns which units (num_units), bool, have an entry that is not zero in any of the slices."""
    is_used = torch.zeros(group.num_units, dtype=torch.bool)
    for part in parts:
        tensor, dim = parameters[part.name].detach(), part.dim
        if part.expert is not None:
            tensor, dim = tensor[part.expert], dim - 1
        others = [other for other in range(tensor.ndim) if other != dim]
        nonzero = (tensor != 0).any(dim=others) if others else tensor != 0
        indices = part.indices(torch.arange(group.num_units))
        is_used |= nonzero.cpu()[indices].view(group.num_units, part.width).any(dim=1)
    return is_used
