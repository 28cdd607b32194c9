"""Removes FFN neurons and attention heads: the same number wherever one field of the config is the size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..model.blocks import is_within
from ..model.coupling import UnitGroup, UnitSlice, find_unit_groups
from .build import SmallerModel
from .config_fields import Stack, find_stack, table_obstacle
from .plan import SizeChange
from .reduction import Reduction, ShrinkError
from .slicing import find_zero_units


# Grouped matrix products of experts need rows of multiples of so many bytes.
_EXPERT_ALIGNMENT = 16

FindZeros = Callable[[UnitGroup, Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass
class _Size:
    """One size of the config, with the groups of units that it sets and which of their units are zero."""

    kind: str
    stack: Stack
    field: str
    groups: list[tuple[UnitGroup, torch.Tensor]]

    @property
    def num_units(self) -> int:
        return self.groups[0][0].num_units

    @property
    def num_zeros(self) -> int:
        return sum(int(is_zero.sum()) for _, is_zero in self.groups)

    @property
    def most_used(self) -> int:
        """The largest number of units in one group that are not zero, at least 1."""
        return max(1, *(int((~is_zero).sum()) for _, is_zero in self.groups))

    def write(self, number: int, config: Any) -> None:
        """Sets the fields of the config for `number` units in each group."""
        section, fields, group = self.stack.section(config), self.stack.fields, self.groups[0][0]
        if self.kind == "neuron":
            setattr(section, self.field, number)
            return
        setattr(section, self.field, number * group.queries_per_unit)
        if fields.kv_heads:
            setattr(section, fields.kv_heads, number)
        if fields.head_dim:
            setattr(section, fields.head_dim, group.head_dim)


def remove_units(reduction: Reduction, kind: str, multiple_of: int, find_zeros: FindZeros = find_zero_units) -> None:
    """Removes the units of a kind that are zero.

    Groups with fewer zeros than others keep all of theirs that the others need: the size is that of the group with
    most units in use.

    Args:
        reduction: of the model.
        kind: "neuron" or "head".
        multiple_of: FFN widths that change become multiples of it.
        find_zeros: returns which units of a group are zero.
    """
    sizes: dict[tuple[tuple[str, ...], str], _Size] = {}
    obstacles: dict[str, int] = {}
    for group in remaining_groups(reduction, kind):
        is_zero = find_zeros(group, reduction.parameters)
        stack = find_stack(reduction.model, group.name)
        obstacle = table_obstacle(reduction.model, group)
        if obstacle is not None or stack is None:
            obstacles[f"{obstacle}"] = obstacles.get(f"{obstacle}", 0) + int(is_zero.sum())
            continue
        field = stack.fields.size_of(group)
        sizes.setdefault((stack.path, field), _Size(kind, stack, field, [])).groups.append((group, is_zero))
    reduction.reasons += [f"{_count(zeros, kind)}: {text}" for text, zeros in obstacles.items() if zeros]
    for size in sizes.values():
        if size.num_zeros:
            _reduce(reduction, size, multiple_of)


def remaining_groups(reduction: Reduction, kind: str) -> list[UnitGroup]:
    """Returns the groups of units of a kind, without their slices in blocks and experts that are removed."""
    groups = []
    for group in find_unit_groups(reduction.model, kind):
        group = replace(group, slices=tuple(part for part in group.slices if not _is_gone(reduction, part)))
        if group.slices:
            groups.append(group)
    return groups


def _is_gone(reduction: Reduction, part: UnitSlice) -> bool:
    """Returns whether a slice is in a block or an expert that is removed."""
    if reduction.is_removed(part.name):
        return True
    kept = next((kept for around, kept in reduction.experts.items() if is_within(part.name, around)), None)
    return part.expert is not None and kept is not None and part.expert not in kept


def _reduce(reduction: Reduction, size: _Size, multiple_of: int) -> None:
    if len({group.num_units for group, _ in size.groups}) > 1:
        sizes = ", ".join(str(number) for number in sorted({group.num_units for group, _ in size.groups}))
        reduction.reasons.append(f"{_count(size.num_zeros, size.kind)}: {size.field} sets modules of sizes {sizes}.")
        return
    multiple = _multiple(reduction, size, multiple_of)
    if size.kind == "neuron":
        after = min(math.ceil(size.most_used / multiple) * multiple, size.num_units)
    else:
        after = _num_heads(reduction, size)
    removed = size.num_units - after
    if removed and not _apply(reduction, size, after):
        reduction.reasons.append(f"{_count(size.num_zeros, size.kind)}: {_describe_failed_trial(size)}")
        return
    padding = size.num_zeros - removed * len(size.groups)
    if padding:
        cost = sum(int(is_zero.sum() - removed) * _unit_parameters(reduction, group) for group, is_zero in size.groups)
        why = f"{size.field} is one size for {len(size.groups)} modules, and {size.most_used:,} are in use in one"
        if after > size.most_used:
            why += (
                f"; it is a multiple of {multiple}" if size.kind == "neuron" else "; the config allows no size between"
            )
        reduction.reasons.append(f"{_count(padding, size.kind)} ({cost:,} parameters): {why}.")


def _apply(reduction: Reduction, size: _Size, after: int) -> bool:
    """Removes units, and returns whether the config can express it: a model that is built from it has these sizes."""
    config, entries = copy.deepcopy(reduction.config), copy.deepcopy(reduction.entries)
    size.write(after, reduction.config)
    for group, is_zero in size.groups:
        reduction.entries.remove_units(group, is_zero.nonzero().flatten()[after - size.num_units :])
    counts = sorted(int(is_zero.sum()) for _, is_zero in size.groups)
    zeros = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
    queries = size.groups[0][0].queries_per_unit
    unit = {"neuron": "neurons", "head": "heads" if queries == 1 else f"groups of {queries} heads"}[size.kind]
    detail = f"{zeros} of {size.num_units:,} {unit} are zero in {_count(len(size.groups), 'module')}"
    change = SizeChange(size.field, size.num_units * queries, after * queries, detail)
    reduction.changes.append(change)
    try:
        SmallerModel(reduction)
    except ShrinkError:
        reduction.config, reduction.entries = config, entries
        reduction.changes.remove(change)
        return False
    return True


def _describe_failed_trial(size: _Size) -> str:
    remedy = "Prune neurons to a quarter instead: about the same speed and quality." if size.kind == "head" else ""
    return (
        f'{size.field} in the config of a "{size.stack.model_type}" model does not set the number of {size.kind}s '
        f"alone, so they can be zero but not removed. {remedy}".strip()
    )


def _multiple(reduction: Reduction, size: _Size, multiple_of: int) -> int:
    readers = [part for group, _ in size.groups for part in group.readers]
    if all(part.expert is None for part in readers):
        return multiple_of
    return math.lcm(multiple_of, max(1, _EXPERT_ALIGNMENT // reduction.parameters[readers[0].name].element_size()))


def _num_heads(reduction: Reduction, size: _Size) -> int:
    """Returns the smallest number of units that is enough for all groups and that the config allows: some require a
    hidden size that is a multiple of the number of heads."""
    for number in range(size.most_used, size.num_units):
        candidate = copy.deepcopy(reduction.config)
        size.write(number, candidate)
        if _is_valid(candidate):
            return number
    return size.num_units


def _is_valid(config: Any) -> bool:
    """Returns whether a config can be read again after it is saved."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # of any kind: each config checks itself in its own way
        return False
    return True


def _unit_parameters(reduction: Reduction, group: UnitGroup) -> int:
    """Returns the number of parameters of one unit."""
    total = 0
    for part in group.slices:
        shape = reduction.entries.shape(part.name)
        others = [size for dim, size in enumerate(shape) if dim != part.dim and (part.expert is None or dim)]
        total += part.width * math.prod(others)
    return total


def _count(number: int, kind: str) -> str:
    return f"{number:,} {kind}" + ("" if number == 1 else "s")
