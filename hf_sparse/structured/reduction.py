"""Decides which units, blocks and experts of a model are removed, and how its config changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..model.blocks import find_block_lists, is_within
from ..model.coupling import UnitGroup, find_unit_groups
from ..model.layers import PrunableLayer, find_layers
from .config_fields import Stack, find_stack, group_obstacle
from .plan import SizeChange
from .slicing import KeptEntries, find_zero_units


LayersToKeep = Sequence[int] | Mapping[str, Sequence[int]]
ExpertsToKeep = Sequence[int] | Mapping[int, Sequence[int]]

# Grouped matrix products of experts need rows of multiples of so many bytes.
_EXPERT_ALIGNMENT = 16


class ShrinkError(ValueError):
    """A model cannot be shrunk. The message says why, and what to do."""


@dataclass
class _Size:
    """One size of the config, with the groups of units that it sets and which of their units are zero."""

    stack: Stack
    field: str
    groups: list[tuple[UnitGroup, torch.Tensor]]

    @property
    def num_units(self) -> int:
        return self.groups[0][0].num_units

    @property
    def most_used(self) -> int:
        return max(int((~is_zero).sum()) for _, is_zero in self.groups)


class Reduction:
    """What is removed from a model. The model is not changed.

    Args:
        model: a model of transformers with whole weights.
        multiple_of: FFN widths that change become multiples of it.

    Attributes:
        config: that of the smaller model.
        entries: what remains of each parameter.
        blocks: name of a list of blocks -> the numbers of those that stay, where some are removed.
        named_blocks: the blocks that were removed because the caller named others.
        experts: name of the module around experts -> the experts that stay, where some are removed.
        changes, reasons: for `ShrinkPlan`.
    """

    def __init__(self, model: nn.Module, multiple_of: int):
        self.model, self.multiple_of = model, multiple_of
        self.parameters = dict(model.named_parameters())
        self.config: Any = copy.deepcopy(model.config)
        tensors = self.parameters | dict(model.named_buffers())
        self.entries = KeptEntries({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self.layers = find_layers(model)
        self.block_lists = find_block_lists(model, [layer for layer in self.layers if layer.in_body])
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.named_blocks: list[str] = []
        self.experts: dict[str, tuple[int, ...]] = {}
        self.changes: list[SizeChange] = []
        self.reasons: list[str] = []

    def is_removed(self, name: str) -> bool:
        """Returns whether a parameter or module is in a block that is removed."""
        for blocks_name, kept in self.blocks.items():
            if is_within(name, blocks_name) and name != blocks_name:
                return int(name.removeprefix(f"{blocks_name}.").split(".")[0]) not in kept
        return False

    # Blocks

    def remove_blocks(self, layers: LayersToKeep | None) -> None:
        """Removes the blocks that are zero, or all but those that the caller names."""
        named = self._named_layers(layers)
        units = {group.name: group for group in find_unit_groups(self.model, "layer")}
        for blocks_name, blocks in self.block_lists.items():
            if blocks_name in named:
                kept = named[blocks_name]
                self.named_blocks += [block for number, block in enumerate(blocks) if number not in kept]
            else:
                kept = self._blocks_that_are_used(blocks_name, blocks, units)
            if len(kept) < len(blocks):
                self._keep_blocks(blocks_name, len(blocks), kept, is_zero=blocks_name not in named)

    def _named_layers(self, layers: LayersToKeep | None) -> dict[str, tuple[int, ...]]:
        """Returns the numbers of the blocks to keep by the name of their list, after checking them."""
        if layers is None:
            return {}
        known = {name: blocks for name, blocks in self.block_lists.items() if self._layers_field(name, blocks)}
        if not isinstance(layers, Mapping):
            if len(known) != 1:
                raise ShrinkError(
                    f"layers is {list(layers)}, but the config of {type(self.model).__name__} has one length for each "
                    f"of these lists of blocks: {_quote(known) or 'none'}. Pass a mapping from their names, or from "
                    'parts of the names such as "encoder", to numbers of blocks.'
                )
            layers = dict.fromkeys(known, layers)
        chosen: dict[str, tuple[int, ...]] = {}
        for key, numbers in layers.items():
            names = [name for name in known if name == key or key in name.split(".")]
            if len(names) != 1:
                raise ShrinkError(f'layers names "{key}", but the lists of blocks are {_quote(known) or "none"}.')
            chosen[names[0]] = self._check_numbers(names[0], known[names[0]], numbers)
        return chosen

    def _check_numbers(self, name: str, blocks: Sequence[str], numbers: Sequence[int]) -> tuple[int, ...]:
        numbers = tuple(numbers)
        if not numbers or list(numbers) != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < len(blocks):
            raise ShrinkError(
                f'layers is {list(numbers)} for "{name}": it must list the blocks to keep in increasing order, from 0 '
                f"to {len(blocks) - 1}."
            )
        if 0 not in numbers and self._first_is_special(blocks):
            raise ShrinkError(
                f'layers is {list(numbers)} for "{name}", but block 0 has parameters that the others do not have, or '
                f"lacks some, and cannot be removed: keep it too, with layers={[0, *numbers]}."
            )
        return numbers

    def _layers_field(self, name: str, blocks: Sequence[str]) -> str | None:
        """Returns the config field for the length of a list of blocks, if it sets that of this list alone."""
        fields = self._length_field(name, blocks)
        same = [other for other, its in self.block_lists.items() if self._length_field(other, its) == fields]
        return fields[1] if fields and same == [name] else None

    def _length_field(self, name: str, blocks: Sequence[str]) -> tuple[tuple[str, ...], str] | None:
        stack = find_stack(self.model, name)
        field = stack.fields.layers if stack else None
        if stack is None or field is None or getattr(stack.section(self.model.config), field, None) != len(blocks):
            return None
        return stack.path, field

    def _blocks_that_are_used(
        self, name: str, blocks: Sequence[str], units: Mapping[str, UnitGroup]
    ) -> tuple[int, ...]:
        zero = [
            number
            for number, block in enumerate(blocks)
            if block in units and bool(find_zero_units(units[block], self.parameters).all())
        ]
        if not zero:
            return tuple(range(len(blocks)))
        obstacle = group_obstacle(self.model, units[blocks[zero[0]]])
        if obstacle is None and self._layers_field(name, blocks) is None:
            obstacle = f'the config has no field for the length of "{name}" alone.'
        if obstacle is not None:
            self.reasons.append(f'{_count(len(zero), "block")} of "{name}": {obstacle}')
            return tuple(range(len(blocks)))
        if 0 in zero and (self._first_is_special(blocks) or len(zero) == len(blocks)):
            zero.remove(0)
            self.reasons.append(f'block 0 of "{name}": it has other parameters than the blocks after it.')
        return tuple(number for number in range(len(blocks)) if number not in zero)

    def _first_is_special(self, blocks: Sequence[str]) -> bool:
        """Returns whether the first block has other parameters than all others: the table of position biases of T5.
        A model that is built with fewer blocks has them in its first block."""
        own = [{name.removeprefix(block) for name in self.parameters if is_within(name, block)} for block in blocks]
        return len(blocks) > 1 and own[0] not in own[1:]

    def _keep_blocks(self, name: str, before: int, kept: tuple[int, ...], is_zero: bool) -> None:
        stack = find_stack(self.model, name)
        if stack is None or stack.fields.layers is None:
            return
        self.blocks[name] = kept
        section = stack.section(self.config)
        for field in stack.fields.per_layer:
            if len(getattr(section, field, None) or ()) == before:
                setattr(section, field, [getattr(section, field)[number] for number in kept])
        for field in stack.fields.layer_numbers:
            numbers = getattr(section, field, None) or ()
            setattr(section, field, [kept.index(number) for number in numbers if number in kept])
        setattr(section, stack.fields.layers, len(kept))
        removed = [number for number in range(before) if number not in kept]
        numbers = ", ".join(str(number) for number in removed)
        detail = f'blocks of "{name}" that are zero: {numbers}' if is_zero else f'blocks of "{name}": {numbers}'
        self.changes.append(SizeChange(stack.fields.layers, before, len(kept), detail))

    # Neurons and heads

    def remove_units(self, kind: str) -> None:
        """Removes the units that are zero, the same number from all groups whose size is one field of the config."""
        sizes: dict[tuple[tuple[str, ...], str], _Size] = {}
        obstacles: dict[str, int] = {}
        for group in find_unit_groups(self.model, kind):
            group = replace(group, slices=tuple(part for part in group.slices if not self._is_gone(part)))
            if not group.slices:
                continue
            is_zero = find_zero_units(group, self.parameters)
            if obstacle := group_obstacle(self.model, group):
                obstacles[obstacle] = obstacles.get(obstacle, 0) + int(is_zero.sum())
                continue
            stack = find_stack(self.model, group.name)
            field = stack and (stack.fields.neurons_of(group) if kind == "neuron" else stack.fields.heads)
            if stack and field:
                sizes.setdefault((stack.path, field), _Size(stack, field, [])).groups.append((group, is_zero))
        self.reasons += [f"{_count(zeros, kind)}: {text}" for text, zeros in obstacles.items() if zeros]
        for size in sizes.values():
            self._reduce(kind, size)

    def _is_gone(self, part: Any) -> bool:
        if self.is_removed(part.name):
            return True
        kept = next((kept for name, kept in self.experts.items() if is_within(part.name, name)), None)
        return part.expert is not None and kept is not None and part.expert not in kept

    def _reduce(self, kind: str, size: _Size) -> None:
        zeros = sum(int(is_zero.sum()) for _, is_zero in size.groups)
        if not zeros:
            return
        if len({group.num_units for group, _ in size.groups}) > 1:
            self.reasons.append(f"{_count(zeros, kind)}: {size.field} is the size of modules of different sizes.")
            return
        after = self._width(size) if kind == "neuron" else self._num_heads(size)
        removed = size.num_units - after
        if removed:
            for group, is_zero in size.groups:
                self.entries.remove_units(group, is_zero.nonzero().flatten()[-removed:])
            self._set_size(kind, size, after)
        padding = zeros - removed * len(size.groups)
        if padding:
            cost = sum(int(after - (~is_zero).sum()) * self._unit_parameters(group) for group, is_zero in size.groups)
            why = "all layers have one size" if kind == "head" else "all layers have one width, a multiple of "
            why += "" if kind == "head" else str(self._multiple(size))
            if kind == "head" and after > max(size.most_used, 1):
                why += ", which the config must allow"
            self.reasons.append(f"{_count(padding, kind)} ({cost:,} parameters): {why} (the largest).")

    def _width(self, size: _Size) -> int:
        multiple = self._multiple(size)
        return min(max(1, math.ceil(size.most_used / multiple)) * multiple, size.num_units)

    def _multiple(self, size: _Size) -> int:
        parts = [part for group, _ in size.groups for part in group.readers]
        if all(part.expert is None for part in parts):
            return self.multiple_of
        bytes_each = self.parameters[parts[0].name].element_size()
        return math.lcm(self.multiple_of, max(1, _EXPERT_ALIGNMENT // bytes_each))

    def _num_heads(self, size: _Size) -> int:
        """Returns the smallest number of units that is enough for all layers and that the config allows."""
        for number in range(max(1, size.most_used), size.num_units):
            candidate = copy.deepcopy(self.config)
            self._write_heads(size, number, candidate)
            if _is_valid(candidate):
                return number
        return size.num_units

    def _write_heads(self, size: _Size, number: int, config: Any) -> None:
        section, fields, group = size.stack.section(config), size.stack.fields, size.groups[0][0]
        setattr(section, size.field, number * group.queries_per_unit)
        if fields.kv_heads:
            setattr(section, fields.kv_heads, number)
        if fields.head_dim:
            setattr(section, fields.head_dim, group.head_dim)

    def _set_size(self, kind: str, size: _Size, after: int) -> None:
        unit, before = "neurons" if kind == "neuron" else "heads", size.num_units
        counts = sorted(int(is_zero.sum()) for _, is_zero in size.groups)
        least_and_most = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        detail = f"{least_and_most} of {before:,} {unit} are zero in each of {len(size.groups)} modules"
        if kind == "neuron":
            setattr(size.stack.section(self.config), size.field, after)
            self.changes.append(SizeChange(size.field, before, after, detail))
            return
        self._write_heads(size, after, self.config)
        queries = size.groups[0][0].queries_per_unit
        if queries > 1:
            detail = detail.replace("heads", f"key-value heads, with {queries} query heads each,")
        self.changes.append(SizeChange(size.field, before * queries, after * queries, detail))

    def _unit_parameters(self, group: UnitGroup) -> int:
        """Returns the number of parameters of one unit."""
        total = 0
        for part in group.slices:
            shape = self.parameters[part.name].shape
            per_index = self.parameters[part.name].numel() // shape[part.dim]
            total += part.width * (per_index // shape[0] if part.expert is not None else per_index)
        return total

    # Experts

    def remove_experts(self, experts: ExpertsToKeep | None) -> None:
        """Keeps only the experts that the caller names, with their rows of the router."""
        if experts is None:
            return
        fused = [layer for layer in self.layers if layer.expert_dim == 0 and not self.is_removed(layer.name)]
        modules = list(dict.fromkeys(layer.module for layer in fused))
        stacks = {module: find_stack(self.model, module) for module in modules}
        if not modules or any(stack is None or stack.fields.experts is None for stack in stacks.values()):
            raise ShrinkError(
                f"experts is given, but the config of {type(self.model).__name__} has no known field for their number."
            )
        counts = set()
        for module in modules:
            layer = next(layer for layer in fused if layer.module == module)
            kept = self._experts_of(module, experts, layer, stacks[module])
            counts.add(len(kept))
            if len(counts) > 1:
                raise ShrinkError("experts must keep the same number in every block: the config has one number.")
            self._keep_experts(module, kept, layer.num_matrices)
            self._write_experts(stacks[module], layer.num_matrices, len(kept))

    def _experts_of(
        self, module: str, experts: ExpertsToKeep, layer: PrunableLayer, stack: Stack | None
    ) -> tuple[int, ...]:
        """Returns the experts of one module that stay, after checking them."""
        block = next(
            (name for names in self.block_lists.values() for name in names if is_within(module, name)), module
        )
        if isinstance(experts, Mapping):
            number = int(block.rpartition(".")[2])
            if number not in experts:
                raise ShrinkError(f"experts has no entry for block {number}: it must have one for each block.")
            experts = experts[number]
        kept = tuple(experts)
        if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < layer.num_matrices:
            raise ShrinkError(
                f'experts is {list(kept)} for "{module}": it must list the experts to keep in increasing order, from '
                f"0 to {layer.num_matrices - 1}."
            )
        per_token = getattr(stack.section(self.config), "num_experts_per_tok", 1) if stack else 1
        if len(kept) < per_token:
            raise ShrinkError(f"experts keeps {len(kept)}, but {per_token} compute each token: keep at least as many.")
        return kept

    def _keep_experts(self, module: str, kept: tuple[int, ...], before: int) -> None:
        """Removes experts from their own parameters and from the router beside them."""
        around = module.rpartition(".")[0]
        if len(kept) == before:
            return
        self.experts[around] = kept
        tensors: Iterable[tuple[str, torch.Tensor]] = [*self.parameters.items(), *self.model.named_buffers()]
        for name, tensor in tensors:
            if is_within(name, around) and tensor.ndim and tensor.shape[0] == before:
                self.entries.keep_experts(name, torch.tensor(kept))

    def _write_experts(self, stack: Stack | None, before: int, after: int) -> None:
        if stack is None or stack.fields.experts is None or before == after:
            return
        setattr(stack.section(self.config), stack.fields.experts, after)
        change = SizeChange(stack.fields.experts, before, after, "experts with their router rows")
        if change not in self.changes:
            self.changes.append(change)


def _is_valid(config: Any) -> bool:
    """Returns whether a saved config could be read again."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # of any kind: each config checks itself in its own way
        return False
    return True


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _count(number: int, kind: str) -> str:
    return f"{number:,} {kind}" + ("" if number == 1 else "s")
