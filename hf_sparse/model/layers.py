"""Prunable layers: finds them in a model, selects among them, and defines the layout of their weights.

Every prunable weight is seen as one or more matrices (R, P, C): R output rows, P kernel positions (1 except for
convolutions) and C input columns. The matrices are views of the parameter, never copies.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ..distributed import full_shape
from ..registry import nearest


# Modules whose experts have shape (E, I, O) without an attribute `is_transposed`.
_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)

BLOCKS, BODY = "all-blocks", "all-body"
DEFAULT_TARGETS = (BLOCKS,)
"""What is selected if nothing is named, see `select_layers`."""


@dataclass(frozen=True)
class Layout:
    """The dimensions of a parameter that hold the rows, the columns and the experts of its matrices.

    Dimensions that are none of these are kernel positions.
    """

    row_dim: int
    column_dim: int
    expert_dim: int | None = None

    def num_matrices(self, shape: Sequence[int]) -> int:
        """Returns the number of matrices of a parameter of `shape`: its experts, or 1."""
        return 1 if self.expert_dim is None else shape[self.expert_dim]

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns the shape (R, P, C) of each matrix of a parameter of `shape`."""
        others = set(range(len(shape))) - {self.row_dim, self.column_dim, self.expert_dim}
        return shape[self.row_dim], math.prod(shape[dim] for dim in others), shape[self.column_dim]

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns views of shape (R, P, C) of a tensor of the parameter's shape, one for each matrix.

        Example:
            >>> [matrix.shape for matrix in LAYOUTS["experts_transposed"].matrices(torch.ones(2, 4, 3))]
            [torch.Size([3, 1, 4]), torch.Size([3, 1, 4])]
        """
        matrices = [tensor] if self.expert_dim is None else list(tensor)
        if self.row_dim > self.column_dim:
            return [matrix.t()[:, None, :] for matrix in matrices]
        return [matrix.flatten(2).transpose(1, 2) if matrix.ndim > 2 else matrix[:, None, :] for matrix in matrices]


LAYOUTS = {
    "linear": Layout(row_dim=0, column_dim=1),
    "conv1d": Layout(row_dim=1, column_dim=0),
    "conv2d": Layout(row_dim=0, column_dim=1),
    "experts": Layout(row_dim=1, column_dim=2, expert_dim=0),
    "experts_transposed": Layout(row_dim=2, column_dim=1, expert_dim=0),
}
"""Kind of a layer -> layout of its weight."""


@dataclass(frozen=True)
class PrunableLayer:
    """A parameter that can be pruned.

    Args:
        name: its name in `model.named_parameters()`.
        kind: "linear" (O, I), "conv1d" (I, O), "conv2d" (O, I, kh, kw), "experts" (E, O, I) or
            "experts_transposed" (E, I, O), for O outputs, I inputs and E experts.
        shape: shape of the parameter.
        in_body: whether it belongs to the body of the model, not to its embeddings or task head.
        in_blocks: whether it belongs to the repeated blocks of the body, not to a pooler or a projection beside them.

    Example:
        >>> layer = PrunableLayer("mlp.experts.down_proj", "experts", (8, 16, 64))
        >>> layer.module, layer.num_matrices, layer.matrix_shape
        ('mlp.experts', 8, (16, 1, 64))
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    in_body: bool = True
    in_blocks: bool = True

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def numel(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def row_dim(self) -> int:
        """The dimension of the parameter that holds the output rows."""
        return LAYOUTS[self.kind].row_dim

    @property
    def column_dim(self) -> int:
        """The dimension of the parameter that holds the input columns."""
        return LAYOUTS[self.kind].column_dim

    @property
    def expert_dim(self) -> int | None:
        """The dimension of the parameter that holds the experts, or None."""
        return LAYOUTS[self.kind].expert_dim

    @property
    def num_matrices(self) -> int:
        """The number of matrices of the weight: its experts, or 1."""
        return LAYOUTS[self.kind].num_matrices(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """The shape (R, P, C) of each matrix of the weight."""
        return LAYOUTS[self.kind].matrix_shape(self.shape)

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns views of shape (R, P, C) of a tensor of the parameter's shape, one for each matrix."""
        return LAYOUTS[self.kind].matrices(tensor)


def find_layers(model: nn.Module) -> list[PrunableLayer]:
    """Finds the prunable parameters of a model: weights of `nn.Linear`, `nn.Conv2d` and transformers' `Conv1D`, and
    fused weights of experts.

    A weight shared by several modules is returned once, a weight tied to an embedding not at all. Of a PEFT model the
    base weights are returned, under their names in that model (`...base_layer.weight`), not those of the adapter.

    Args:
        model: the model, which may be sharded or on the meta device.

    Returns:
        The layers, in the order of `model.named_modules()`. Layers of the task head and layers in modules with
        "embed" in their name have `in_body=False`. These, and layers in no `nn.ModuleList` if most weights of the
        body are in one, have `in_blocks=False`.

    Example:
        >>> find_layers(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
        [PrunableLayer(name='1.weight', kind='linear', shape=(2, 4), in_body=True, in_blocks=True)]
    """
    parameters = dict(model.named_parameters())  # kept alive, so that their ids stay unique
    names = {id(parameter): name for name, parameter in parameters.items()}
    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    seen |= _adapter_parameters(model)
    body = _body_parameters(model)
    layers = []
    for path, module in model.named_modules():
        is_embedding = "embed" in path.lower()
        for parameter, kind in _prunable(module):
            if id(parameter) not in names:  # PEFT recreates weights of MultiheadAttention at each access
                continue
            is_quantized = not parameter.is_floating_point() or parameter.element_size() == 1
            if id(parameter) not in seen and not is_quantized:
                seen.add(id(parameter))
                in_body = id(parameter) in body and not is_embedding
                layers.append(PrunableLayer(names[id(parameter)], kind, tuple(full_shape(parameter)), in_body))
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefixes = tuple(f"{path}." if path else "" for path in lists)
    return mark_blocks(layers, lambda layer: layer.name.startswith(prefixes))


def mark_blocks(layers: Sequence[PrunableLayer], is_repeated: Callable[[PrunableLayer], bool]) -> list[PrunableLayer]:
    """Returns layers with their `in_blocks`: those of the body that are repeated, or the whole body if most of its
    weights are not.

    Args:
        layers: the layers of a model.
        is_repeated: whether a layer is in a list of modules.
    """
    body = [layer for layer in layers if layer.in_body]
    blocks = {layer for layer in body if is_repeated(layer)}
    if 2 * sum(layer.numel for layer in blocks) < sum(layer.numel for layer in body):
        blocks = set(body)
    return [replace(layer, in_blocks=layer in blocks) for layer in layers]


def _body_parameters(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters of the model's body: of `base_model` where a transformers model has one,
    without the output embeddings."""
    if hasattr(model, "get_base_model"):  # a PEFT model, whose own `base_model` is the whole model with its head
        model = cast(Any, model).get_base_model()
    body = getattr(model, "base_model", model)
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outputs = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    return {id(parameter) for parameter in body.parameters()} - outputs


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters that PEFT adds to the base weights: the matrices of adapters and, of each
    module in `modules_to_save`, the original that its trained copy replaces."""
    adapters: set[int] = set()
    for module in model.modules():
        if not hasattr(module, "adapter_layer_names"):  # the mark of a PEFT layer
            continue
        active = getattr(module, "modules_to_save", None) or getattr(module, "base_layer", None)
        base = {id(parameter) for parameter in active.parameters()} if isinstance(active, nn.Module) else set()
        adapters |= {id(parameter) for parameter in module.parameters()} - base
    return adapters


def plain_name(name: str) -> str:
    """Returns the name that a parameter of a PEFT model has in the model without PEFT.

    Example:
        >>> plain_name("base_model.model.encoder.query.base_layer.weight")
        'encoder.query.weight'
        >>> plain_name("base_model.model.score.modules_to_save.default.weight")
        'score.weight'
    """
    name = re.sub(r"(\.base_layer)+\.", ".", name.removeprefix("base_model.model."))
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _prunable(module: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """Yields the prunable parameters that `module` itself holds, each with its kind."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        # A parametrized weight is recomputed at each access: it is not a parameter and cannot be pruned in place.
        if isinstance(weight, nn.Parameter):
            yield weight, "linear" if isinstance(module, nn.Linear) else "conv2d"
    elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        if isinstance(weight, nn.Parameter):
            yield weight, "conv1d"
    elif type(module).__name__.endswith("Experts") or hasattr(module, "num_experts"):
        transposed = getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED_EXPERTS)
        kind = "experts_transposed" if transposed else "experts"
        for parameter in module.parameters(recurse=False):
            if len(full_shape(parameter)) == 3:
                yield parameter, kind


def select_layers(
    layers: Sequence[PrunableLayer], targets: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[list[PrunableLayer], list[str]]:
    """Selects the layers that match `targets` and do not match `exclude`.

    A pattern is a glob or, after the prefix `re:`, a regular expression. A glob must match the whole name of a
    parameter or its module, of which leading parts may be left out; `*` also matches dots. A regular expression may
    match anywhere in the parameter name. "all-blocks" stands for the layers of the model's repeated blocks, "all-body"
    for all of its body: also a pooler or a projection beside the blocks, but neither embeddings nor task head.

    Args:
        layers: the layers to select from.
        targets: patterns of layers to select; None means `DEFAULT_TARGETS`, "all-blocks".
        exclude: patterns of layers to leave out; None or an empty sequence excludes nothing.

    Returns:
        The selected layers in their original order, and one error message for each invalid pattern, each pattern
        without a match, and an empty selection.

    Example:
        >>> layers = find_layers(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
        >>> [layer.name for layer in select_layers(layers, None, ["0"])[0]]
        ['1.weight']
    """
    errors: list[str] = []
    selected = _matching(layers, DEFAULT_TARGETS if targets is None else targets, "targets", errors)
    excluded = set(_matching(layers, exclude or (), "exclude", errors))
    selected = [layer for layer in selected if layer not in excluded]
    if not selected and not errors:
        errors.append(f"nothing is left to prune: `targets={targets}`, `exclude={exclude}`.")
    return selected, errors


_ALL: dict[str, Callable[[PrunableLayer], bool]] = {
    BLOCKS: lambda layer: layer.in_blocks,
    BODY: lambda layer: layer.in_body,
}


def _matching(
    layers: Sequence[PrunableLayer], patterns: Sequence[str], field: str, errors: list[str]
) -> list[PrunableLayer]:
    """Returns the layers that match any pattern; appends to `errors`, where `field` names the option."""
    matching: set[PrunableLayer] = set()
    for pattern in patterns:
        try:
            matches = {layer for layer in layers if _matches(pattern, layer)}
        except (re.error, OverflowError, RecursionError) as error:
            errors.append(f'`{field}`: "{pattern}" is not a regular expression: {error}.')
            continue
        if not matches and pattern not in _ALL:
            names = [layer.module for layer in layers]
            errors.append(
                f'`{field}`: "{pattern}" matches none of the {len(layers)} prunable parameters '
                f"(such as {', '.join(names[:3]) or 'none'}).{nearest(pattern, names)}"
            )
        matching |= matches
    return [layer for layer in layers if layer in matching]


def _matches(pattern: str, layer: PrunableLayer) -> bool:
    if pattern in _ALL:
        return _ALL[pattern](layer)
    if pattern.startswith("re:"):
        return re.search(pattern[3:], layer.name) is not None
    plain = plain_name(layer.name)  # so that patterns for a model also match once PEFT wraps it
    names = (layer.name, layer.module, plain, plain.rpartition(".")[0])
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern) for name in names)
