"""Removes whole blocks: those that add nothing to the residual stream, or all that the caller does not name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..model.blocks import is_within
from ..model.coupling import UnitGroup, find_unit_groups
from .config_fields import StackFields, find_stack, table_obstacle
from .plan import SizeChange
from .reduction import Reduction, ShrinkError
from .slicing import find_zero_units


LayersToKeep = Sequence[int] | Mapping[str, Sequence[int]]


def remove_blocks(reduction: Reduction, layers: LayersToKeep | None) -> None:
    """Removes blocks from a model.

    Args:
        reduction: of the model.
        layers: numbers of the blocks to keep; a mapping from names of lists of blocks, or parts of the names, to
            them; or None to remove the blocks that are zero.

    Raises:
        ShrinkError: `layers` is not valid.
    """
    named = _named_layers(reduction, layers)
    units = {group.name: group for group in find_unit_groups(reduction.model, "layer")}
    for name, blocks in reduction.block_lists.items():
        if name in named:
            kept = named[name]
            reduction.named_blocks += [block for number, block in enumerate(blocks) if number not in kept]
        else:
            kept = _used_blocks(reduction, name, units)
        if len(kept) < len(blocks):
            keep_blocks(reduction, name, kept)


def keep_blocks(reduction: Reduction, name: str, kept: tuple[int, ...]) -> None:
    """Keeps only the blocks with the numbers `kept` of the list `name`."""
    stack = find_stack(reduction.model, name)
    field = stack.fields.layers if stack else None
    if stack is None or field is None:
        return
    before = len(reduction.block_lists[name])
    reduction.blocks[name] = kept
    section = stack.section(reduction.config)
    _shorten_lists(section, stack.fields, before, kept)
    setattr(section, field, len(kept))
    removed = ", ".join(str(number) for number in range(before) if number not in kept)
    reduction.changes.append(SizeChange(field, before, len(kept), f'without blocks {removed} of "{name}"'))


def _shorten_lists(section: Any, fields: StackFields, before: int, kept: Sequence[int]) -> None:
    """Adapts the lists of the config that have an entry for each block, or that hold numbers of blocks."""
    for field in fields.per_layer:
        values = getattr(section, field, None)
        if isinstance(values, (list, tuple)) and len(values) == before:
            setattr(section, field, [values[number] for number in kept])
    for field in fields.layer_numbers:
        numbers = set(getattr(section, field, None) or ())
        if fields.layer_step and (step := getattr(section, fields.layer_step, 1)) > 1:
            numbers |= {number for number in range(before) if (number + 1) % step}
            setattr(section, fields.layer_step, 1)
        setattr(section, field, [kept.index(number) for number in sorted(numbers) if number in kept])


def _named_layers(reduction: Reduction, layers: LayersToKeep | None) -> dict[str, tuple[int, ...]]:
    """Returns the numbers of the blocks to keep by the name of their list, after checking them."""
    if layers is None:
        return {}
    known = [name for name in reduction.block_lists if _has_own_length(reduction, name)]
    if not isinstance(layers, Mapping):
        if len(known) != 1:
            raise ShrinkError(
                f"`layers` is {list(layers)}, but these lists of blocks of {type(reduction.model).__name__} each have "
                f"a length in the config: {_quote(known) or 'none'}. Pass a mapping from their names, or from parts "
                'of the names such as "encoder", to numbers of blocks.'
            )
        layers = {known[0]: layers}
    chosen: dict[str, tuple[int, ...]] = {}
    for key, numbers in layers.items():
        names = [name for name in known if name == key or key in name.split(".")]
        if len(names) != 1:
            raise ShrinkError(
                f'`layers` names "{key}", but the lists of blocks whose length can change are '
                f"{_quote(known) or 'none'}."
            )
        chosen[names[0]] = _check_numbers(reduction, names[0], numbers)
    return chosen


def _check_numbers(reduction: Reduction, name: str, numbers: Sequence[int]) -> tuple[int, ...]:
    number_of_blocks, numbers = len(reduction.block_lists[name]), tuple(numbers)
    if not numbers or list(numbers) != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= number_of_blocks:
        raise ShrinkError(
            f'`layers` is {list(numbers)} for "{name}": it must list the blocks to keep in increasing order, from 0 '
            f"to {number_of_blocks - 1}."
        )
    if 0 not in numbers and _is_first_special(reduction, name):
        raise ShrinkError(
            f'`layers` is {list(numbers)} for "{name}", but block 0 has other parameters than the blocks after it and '
            f"cannot be removed: keep it too, with `layers={[0, *numbers]}`."
        )
    return numbers


def _has_own_length(reduction: Reduction, name: str) -> bool:
    """Returns whether a config field is the length of this list of blocks and of no other."""
    fields = _length_field(reduction, name)
    return (
        fields is not None and [_length_field(reduction, other) for other in reduction.block_lists].count(fields) == 1
    )


def _length_field(reduction: Reduction, name: str) -> tuple[tuple[str, ...], str] | None:
    stack = find_stack(reduction.model, name)
    if stack is None or stack.fields.layers is None:
        return None
    length = getattr(stack.section(reduction.model.config), stack.fields.layers, None)
    return (stack.path, stack.fields.layers) if length == len(reduction.block_lists[name]) else None


def _used_blocks(reduction: Reduction, name: str, units: Mapping[str, UnitGroup]) -> tuple[int, ...]:
    """Returns the numbers of the blocks that are not zero or cannot be removed."""
    blocks = reduction.block_lists[name]
    zero = [
        number
        for number, block in enumerate(blocks)
        if block in units and bool(find_zero_units(units[block], reduction.parameters).all())
    ]
    if not zero:
        return tuple(range(len(blocks)))
    obstacle = table_obstacle(reduction.model, units[blocks[zero[0]]])
    if obstacle is None and not _has_own_length(reduction, name):
        obstacle = "the config has no field for the length of this list alone."
    if obstacle is not None:
        numbers = ", ".join(str(number) for number in zero)
        reduction.reasons.append(f'blocks {numbers} of "{name}": {obstacle}')
        return tuple(range(len(blocks)))
    if 0 in zero and (len(zero) == len(blocks) or _is_first_special(reduction, name)):
        zero.remove(0)
        why = (
            "the model needs a block" if len(zero) == len(blocks) - 1 else "the blocks after it have other parameters"
        )
        reduction.reasons.append(f'block 0 of "{name}": {why}.')
    return tuple(number for number in range(len(blocks)) if number not in zero)


def _is_first_special(reduction: Reduction, name: str) -> bool:
    """Returns whether the first block has other parameters than all others, such as the position biases of T5. The
    first block of a model that is built with fewer blocks has them."""
    first, *others = [
        {parameter.removeprefix(block) for parameter in reduction.parameters if is_within(parameter, block)}
        for block in reduction.block_lists[name]
    ]
    return bool(others) and first not in others


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
