"""Coupled units: slices of several parameters that are pruned, and removed from a model, together.

    FFN neuron i      row i of up (and of gate) with its biases, column i of down
    attention head h  rows of h in the query, key and value projections with their biases, columns of h in the output
                      projection; with grouped queries, a key-value head and all query heads that share it
    value v           row v of one key-value head in the value projection with its bias, its columns in the output
                      projection; values are never pruned together, but their order in a head is free, as that of
                      neurons in an FFN is
    layer             the matrices with which a block writes to the residual stream, with their biases

Units are found from the module structure and from shapes alone, so that models on the meta device and sharded models
have the same units as plain ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..distributed import full_shape
from .blocks import find_block_lists, is_within
from .layers import PrunableLayer, find_layers, plain_name


_PROJECTION = re.compile(r"(?:pos_)?(q|query|k|key|v|value)(?:_proj|_lin|_linear)?")
# Fused projections whose rows are all queries, then all keys, then all values.
_FUSED_PROJECTION = re.compile(r"c_attn|Wqkv|qkv|qkv_proj|in_proj")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
# Fused experts whose gate and up rows alternate; those of all others are two halves.
_INTERLEAVED_EXPERTS = ("GptOssExperts",)


@dataclass(frozen=True)
class UnitSlice:
    """The entries of one parameter that belong to coupled units.

    Unit u owns the indices offset + u * width, ..., offset + (u + 1) * width - 1 of dimension `dim`.

    Args:
        name: of the parameter in `model.named_parameters()`.
        dim: the dimension of the parameter that units divide.
        width: number of indices of `dim` that one unit owns.
        offset: first index of unit 0. A fused projection has several slices.
        expert: index of dimension 0 that the units belong to, for the fused weights of experts.
        reads: whether the parameter reads the units (columns of `down`), and does not produce them (rows of `up`).
        values: of heads, whether the slice holds the rows of their values.

    Example:
        >>> UnitSlice("qkv.weight", dim=0, width=4, offset=16).indices(torch.tensor([0, 2]))
        tensor([16, 17, 18, 19, 24, 25, 26, 27])
    """

    name: str
    dim: int
    width: int = 1
    offset: int = 0
    expert: int | None = None
    reads: bool = False
    values: bool = False

    def indices(self, units: torch.Tensor) -> torch.Tensor:
        """Returns the indices (n * width) of `dim` that belong to `units` (n), int64, unit after unit."""
        within = torch.arange(self.width, device=units.device)
        return (self.offset + units[:, None] * self.width + within).reshape(-1)


@dataclass(frozen=True)
class UnitGroup:
    """The coupled units of one kind in one place of the model, such as the neurons of one FFN.

    Args:
        kind: "neuron", "head", "value" or "layer".
        name: of the module that contains the units.
        num_units: number of units.
        slices: what is zero where a unit is pruned.
        attached: what is removed with a unit but need not be zero: a table of position biases of each head.
        head_dim: size of one head, for heads.
        queries_per_unit: number of query heads of one unit, for heads.
    """

    kind: str
    name: str
    num_units: int
    slices: tuple[UnitSlice, ...]
    attached: tuple[UnitSlice, ...] = ()
    head_dim: int = 0
    queries_per_unit: int = 1

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that the units divide, each once."""
        return list(dict.fromkeys(part.name for part in self.slices))

    @property
    def readers(self) -> tuple[UnitSlice, ...]:
        """The slices of the matrices that read the units."""
        return tuple(part for part in self.slices if part.reads)


def find_unit_groups(model: nn.Module, kind: str) -> list[UnitGroup]:
    """Finds the coupled units of a kind in the repeated blocks of a model, in the order of its modules.

    An attention module is an outermost module of a block with "Attention" in its class name. An FFN is the smallest
    module, outside of attention, whose prunable weights are one or two matrices (I, H), or one of both halves
    (2 I, H), and one matrix (H, I). Attention and FFNs of other structure have no units.

    Args:
        model: any module, which may be sharded or on the meta device.
        kind: "neuron", "head", "value" or "layer".

    Raises:
        ValueError: the kind is unknown.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
        >>> (group,) = find_unit_groups(nn.ModuleList([block]), "neuron")
        >>> group.name, group.num_units
        ('0', 6)
        >>> [(part.name, part.dim) for part in group.slices]
        [('0.0.weight', 0), ('0.0.bias', 0), ('0.2.weight', 1)]
    """
    structure = _Structure(model)
    if kind == "neuron":
        return [group for ffn in structure.ffns() for group in structure.neurons(*ffn)]
    if kind == "head":
        return structure.heads()
    if kind == "value":
        return [group for name in structure.attention for group in structure.values(name)]
    if kind == "layer":
        return structure.block_units()
    raise ValueError(f'kind of units is "{kind}": known are neuron, head, value and layer.')


class _Structure:
    """The blocks, attention modules and FFNs of a model."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.shapes = {name: tuple(full_shape(parameter)) for name, parameter in model.named_parameters()}
        self.config = getattr(model, "config", None)
        self.layers = [layer for layer in find_layers(model) if layer.in_body]
        self.block_lists = find_block_lists(model, self.layers)
        self.attention = [name for blocks in self.block_lists.values() for name in self._attention_modules(blocks)]

    def _attention_modules(self, blocks: Sequence[str]) -> Iterator[str]:
        outer: str | None = None
        for name, module in self.modules.items():
            if outer is not None and is_within(name, outer):
                continue
            if "Attention" in type(module).__name__ and any(is_within(name, block) for block in blocks):
                outer = name
                if self._layers_in(name):
                    yield name

    def _layers_in(self, module: str) -> list[PrunableLayer]:
        return [layer for layer in self.layers if is_within(layer.module, module)]

    def _part(self, layer: PrunableLayer, reads: bool, **where: Any) -> list[UnitSlice]:
        """Returns the slice of a weight: of its columns if it reads the units, of its rows, with their biases, if it
        produces them."""
        if reads:
            return [UnitSlice(layer.name, layer.column_dim, reads=True, **where)]
        bias = f"{layer.name}_bias" if layer.expert_dim is not None else f"{layer.module}.bias"
        parts = [UnitSlice(layer.name, layer.row_dim, **where)]
        if bias in self.shapes:
            parts.append(UnitSlice(bias, len(self.shapes[bias]) - 1, **where))
        return parts

    # Feed-forward networks

    def ffns(self) -> list[tuple[str, list[PrunableLayer], PrunableLayer]]:
        """Returns the name, the matrices (I, H) and the matrix (H, I) of each FFN. Inner modules are tried first."""
        found: dict[str, tuple[str, list[PrunableLayer], PrunableLayer]] = {}
        taken = {layer.name for name in self.attention for layer in self._layers_in(name)}
        blocks = [block for blocks in self.block_lists.values() for block in blocks]
        candidates = [name for name in self.modules if any(is_within(name, block) for block in blocks)]
        for name in sorted(candidates, key=lambda name: -name.count(".")):
            layers = [layer for layer in self._layers_in(name) if layer.name not in taken]
            ffn = _split_ffn(layers)
            if ffn:
                found[layers[0].name] = (name, *ffn)
                taken |= {layer.name for layer in layers}
        return [found[layer.name] for layer in self.layers if layer.name in found]

    def neurons(self, name: str, inner: list[PrunableLayer], outer: PrunableLayer) -> list[UnitGroup]:
        """Returns the neurons of an FFN, or of each expert of a fused one."""
        width, groups = outer.matrix_shape[2], []
        experts: list[int | None] = [None] if outer.expert_dim is None else list(range(outer.num_matrices))
        interleaved = type(self.modules[outer.module]).__name__ in _INTERLEAVED_EXPERTS
        for expert in experts:
            parts: list[UnitSlice] = []
            for layer in inner:
                if layer.matrix_shape[0] == width:
                    parts += self._part(layer, reads=False, expert=expert)
                elif interleaved:
                    parts += self._part(layer, reads=False, expert=expert, width=2)
                else:
                    parts += self._part(layer, reads=False, expert=expert)
                    parts += self._part(layer, reads=False, expert=expert, offset=width)
            parts += self._part(outer, reads=True, expert=expert)
            groups.append(UnitGroup("neuron", name if expert is None else f"{name}.{expert}", width, tuple(parts)))
        return groups

    # Attention

    def heads(self) -> list[UnitGroup]:
        groups = [group for name in self.attention for group in self._heads(name)]
        for blocks_name, blocks in self.block_lists.items():
            groups = self._share_position_biases(groups, blocks_name, blocks)
        return groups

    def _heads(self, name: str) -> Iterator[UnitGroup]:
        """Yields the heads of an attention module, if its projections have a known structure."""
        producers: dict[str, tuple[str, PrunableLayer]] = {}
        fused: list[PrunableLayer] = []
        others: list[PrunableLayer] = []
        for layer in self._layers_in(name):
            leaf = plain_name(layer.name).split(".")[-2]
            match = _PROJECTION.fullmatch(leaf)
            if match:
                producers[layer.name] = match[1][0], layer
            else:
                (fused if _FUSED_PROJECTION.fullmatch(leaf) else others).append(layer)
        size = self._head_dim(name)
        if len(others) != 1 or not size or bool(producers) == (len(fused) == 1):
            return
        output = others[0]
        num_queries = output.matrix_shape[2] // size
        if fused:
            num_units = (fused[0].matrix_shape[0] // size - num_queries) // 2
        else:
            num_units = min(layer.matrix_shape[0] for _, layer in producers.values()) // size
        if num_units < 1 or num_queries % num_units:
            return
        query_width, parts = num_queries // num_units * size, []
        for letter, layer in producers.values():
            width = query_width if letter == "q" else size
            parts += self._part(layer, reads=False, width=width, values=letter == "v")
        for layer in fused:
            for index, width in enumerate((query_width, size, size)):
                offset = (num_queries + max(0, index - 1) * num_units) * size if index else 0
                parts += self._part(layer, reads=False, width=width, offset=offset, values=index == 2)
        parts += self._part(output, reads=True, width=query_width)
        if all(self._is_covered(parts, part.name, num_units) for part in parts):
            yield UnitGroup("head", name, num_units, tuple(parts), (), size, num_queries // num_units)

    def values(self, name: str) -> Iterator[UnitGroup]:
        """Yields the values of each key-value head of an attention module."""
        for heads in self._heads(name):
            size, per_unit = heads.head_dim, heads.queries_per_unit
            for head in range(heads.num_units):
                values = (part for part in heads.slices if part.values)
                parts = [replace(part, width=1, offset=part.offset + head * size) for part in values]
                for part in heads.readers:
                    queries = range(head * per_unit, (head + 1) * per_unit)
                    parts += [replace(part, width=1, offset=query * size) for query in queries]
                yield UnitGroup("value", f"{name}.{head}", size, tuple(parts))

    def _is_covered(self, parts: Sequence[UnitSlice], name: str, num_units: int) -> bool:
        """Returns whether the slices of a parameter are its whole size along the dimension that units divide."""
        own = [part for part in parts if part.name == name]
        return sum(part.width for part in own) * num_units == self.shapes[name][own[0].dim]

    def _head_dim(self, name: str) -> int | None:
        for path, module in self.modules.items():
            if is_within(path, name):
                for attribute in _HEAD_DIM:
                    if isinstance(value := getattr(module, attribute, None), int):
                        return value
        return getattr(self.config, "head_dim", None)

    def _share_position_biases(
        self, groups: list[UnitGroup], blocks_name: str, blocks: Sequence[str]
    ) -> list[UnitGroup]:
        """Joins the heads of blocks that share one table of position biases (T5): head h is one unit over all
        blocks."""
        stack = blocks_name.rpartition(".")[0]
        for table, module in self.modules.items():
            if not isinstance(module, nn.Embedding) or "bias" not in table or not is_within(table, stack):
                continue
            inside = [group for group in groups if any(is_within(group.name, block) for block in blocks)]
            owner = next((group for group in inside if is_within(table, group.name)), inside[0] if inside else None)
            if owner is None or self.shapes[f"{table}.weight"][1] != owner.num_units * owner.queries_per_unit:
                continue
            path = owner.name.removeprefix(next(block for block in blocks if is_within(owner.name, block)))
            shared = [group for group in inside if group.name in [block + path for block in blocks]]
            attached = UnitSlice(f"{table}.weight", 1, width=owner.queries_per_unit)
            slices = tuple(part for group in shared for part in group.slices)
            first = groups.index(shared[0])
            groups = [group for group in groups if group not in shared]
            groups.insert(first, replace(owner, name=blocks_name, slices=slices, attached=(attached,)))
        return groups

    # Whole blocks

    def block_units(self) -> list[UnitGroup]:
        """Returns each block as one unit: the outputs of its attention modules and FFNs, which are all that it adds
        to the residual stream."""
        outputs = {part.name for group in self.heads() for part in group.readers}
        outputs |= {outer.name for _, _, outer in self.ffns()}
        groups = []
        for block in (block for blocks in self.block_lists.values() for block in blocks):
            writers = [layer for layer in self._layers_in(block) if layer.name in outputs]
            attention = [name for name in self.attention if is_within(name, block)]
            if not writers or not all(any(is_within(layer.module, name) for layer in writers) for name in attention):
                continue
            parts = [part for layer in writers for part in self._part(layer, reads=False)]
            slices = tuple(replace(part, width=self.shapes[part.name][part.dim]) for part in parts)
            groups.append(UnitGroup("layer", block, 1, slices))
        return groups


def _split_ffn(layers: Sequence[PrunableLayer]) -> tuple[list[PrunableLayer], PrunableLayer] | None:
    """Returns the matrices that produce and the one that reads the neurons, or None if the layers are no FFN.

    Among square matrices the last one reads.
    """
    if not 2 <= len(layers) <= 3 or len({layer.kind for layer in layers}) > 1:
        return None
    for outer in reversed(layers):
        inner = [layer for layer in layers if layer is not outer]
        outputs, _, width = outer.matrix_shape
        sizes = {layer.matrix_shape[0] for layer in inner}
        is_fused = len(inner) == 1 and sizes == {2 * width}
        if all(layer.matrix_shape[2] == outputs for layer in inner) and (sizes == {width} or is_fused):
            return inner, outer
    return None
