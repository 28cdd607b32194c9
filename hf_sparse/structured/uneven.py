"""Layers of different sizes: every layer keeps what it uses, which no config of transformers can express.

The sizes that differ from those of the config are saved beside it, and given to a model that is built from the config
before its weights are loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..model.coupling import UnitGroup
from .plan import SizeChange
from .reduction import Reduction
from .slicing import find_zero_units
from .unit_removal import remaining_groups


QUANT_METHOD = "hf_sparse"
"""What `quantization_config` in config.json names: transformers then asks for a quantizer of this name, and refuses to
load the model where there is none."""

SIZES_VERSION = 1
"""Version of what `describe_sizes` returns, in config.json."""

_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads",)
_ALL_HEADS_SIZE = ("all_head_size", "inner_dim", "split_size")


def remove_units_by_layer(reduction: Reduction, kind: str, multiple_of: int) -> dict[str, tuple[UnitGroup, int]]:
    """Removes the zero units of each group, whatever remains of the others; experts that are fused into one weight
    keep equally many.

    Args:
        reduction: of the model.
        kind: "neuron" or "head".
        multiple_of: FFN widths that change become multiples of it.

    Returns:
        Name of each group that got smaller -> the group and the number of its units that remain. At least one does.
    """
    groups = remaining_groups(reduction, kind)
    zeros = [find_zero_units(group, reduction.parameters) for group in groups]
    used: dict[str, int] = {}
    for group, is_zero in zip(groups, zeros, strict=True):
        used[_shared_size(reduction, group)] = max(used.get(_shared_size(reduction, group), 1), int((~is_zero).sum()))
    smaller: dict[str, tuple[UnitGroup, int]] = {}
    for group, is_zero in zip(groups, zeros, strict=True):
        multiple = multiple_of if kind == "neuron" else 1
        kept = min(math.ceil(used[_shared_size(reduction, group)] / multiple) * multiple, group.num_units)
        if kept < group.num_units:
            reduction.entries.remove_units(group, is_zero.nonzero().flatten()[kept - group.num_units :])
            smaller[group.name] = group, kept
            detail = f"{int(is_zero.sum()):,} of {group.num_units:,} {kind}s are zero"
            reduction.changes.append(SizeChange(f"{kind}s of {group.name}", group.num_units, kept, detail))
    return smaller


def _shared_size(reduction: Reduction, group: UnitGroup) -> str:
    """Returns a name that groups have in common which need the same size: experts of a fused weight, and attention
    modules of all blocks where the first one computes the position bias of the others (T5)."""
    part = group.readers[0]
    if part.expert is not None:
        return part.name
    modules = reduction.model.get_submodule(group.name).modules()
    if any(hasattr(module, "has_relative_attention_bias") for module in modules):
        return re.sub(r"\.\d+(?=\.|$)", "", group.name)
    return group.name


def set_head_counts(model: nn.Module, sizes: Mapping[str, tuple[UnitGroup, int]]) -> None:
    """Sets the numbers of heads that attention modules hold as attributes.

    Args:
        model: with the smaller weights.
        sizes: the groups that got smaller, under their names in `model`, and the number of units that remain.
    """
    for group, kept in sizes.values():
        for name in dict.fromkeys(part.name.rpartition(".")[0] for part in group.slices if not part.reads):
            module = model.get_submodule(name.rpartition(".")[0])
            heads = group.num_units * group.queries_per_unit
            new = dict.fromkeys(_HEADS, (heads, kept * group.queries_per_unit))
            new |= dict.fromkeys(_KV_HEADS, (group.num_units, kept))
            sizes_of_all = heads * group.head_dim, kept * group.queries_per_unit * group.head_dim
            new |= dict.fromkeys(_ALL_HEADS_SIZE, sizes_of_all)
            for key, (before, after) in new.items():
                if getattr(module, key, None) == before:
                    setattr(module, key, after)


def describe_sizes(model: nn.Module) -> dict[str, Any]:
    """Returns how a model differs in size from one that is built from its config, for `apply_sizes`.

    Returns:
        "shapes": name of each parameter of another shape -> its shape; "attributes": name of each module -> its
        attributes of another integer value. JSON values.
    """
    with torch.device("meta"):
        plain: Any = type(model)(model.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    modules = dict(plain.named_modules())
    differing = {
        name: list(parameter.shape)
        for name, parameter in model.named_parameters()
        if tuple(parameter.shape) != shapes.get(name)
    }
    attributes = {}
    for name, module in model.named_modules():
        values = {key: value for key, value in _integers(module) if getattr(modules[name], key, value) != value}
        if values:
            attributes[name] = values
    return {"shapes": differing, "attributes": attributes}


def apply_sizes(model: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Gives a model, whose weights are still to be loaded, the sizes that `describe_sizes` returned.

    Args:
        model: built from the same config, of any class of the same model type: names with and without the prefix of
            the base model are known.
        sizes: "shapes" and "attributes".

    Raises:
        ValueError: the sizes are not those of a model of this structure.
    """
    prefix = getattr(model, "base_model_prefix", "")
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, shape in sizes["shapes"].items():
        match = next((other for other in _names(name, prefix) if other in parameters), None)
        if match is None:  # of a task head that this class does not have
            continue
        old = parameters[match]
        if old.ndim != len(shape) or any(size > most for size, most in zip(shape, old.shape, strict=True)):
            raise ValueError(
                f'"{name}" of shape {tuple(shape)} does not fit the config, which has {tuple(old.shape)}.'
            )
        owner, _, leaf = match.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(old.new_empty(shape), old.requires_grad))
    for name, values in sizes["attributes"].items():
        module = next((modules[other] for other in _names(name, prefix) if other in modules), None)
        for key, value in values.items() if module is not None else ():
            if type(getattr(module, key, None)) is not int or type(value) is not int:
                raise ValueError(f'"{name}" has no integer attribute "{key}".')
            setattr(module, key, value)


def _names(name: str, prefix: str) -> Iterator[str]:
    yield name
    yield f"{prefix}.{name}"
    yield name.removeprefix(f"{prefix}.")


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields the attributes of a module that are integers, except the number of its layer."""
    for key, value in vars(module).items():
        if type(value) is int and key != "layer_idx" and not key.startswith("_"):
            yield key, value


def set_layer_sizes(model: nn.Module) -> None:
    """Sets the sizes that linear layers and embeddings hold as attributes to those of their weights."""
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim != 2:
            continue
        for keys in (("out_features", "in_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")):
            if all(hasattr(module, key) for key in keys):
                for key, size in zip(keys, weight.shape, strict=True):
                    setattr(module, key, size)
