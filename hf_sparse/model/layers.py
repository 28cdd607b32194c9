"""Which parameters can be pruned, which of them are, and the one layout in which everything above sees them.

Layout: every weight is shown as one or more matrices (R, P, C): R output rows, P kernel positions (1 but for a
convolution), C inputs. They are always views, never copies.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..distributed import full_shape
from ..registry import nearest


# Experts of shape (E, I, O) that do not say so by an attribute `is_transposed`.
_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)


@dataclass(frozen=True)
class PrunableLayer:
    """One prunable parameter.

    Args:
        name: its name in `model.named_parameters()`.
        kind: "linear" (O, I), "conv1d" (I, O), "conv2d" (O, I, kh, kw), "experts" (E, O, I) or
            "experts_transposed" (E, I, O).
        shape: of the parameter.
        in_base: whether it belongs to the body of the model, not to its task head.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    in_body: bool = True

    @property
    def module(self) -> str:
        """The name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def numel(self) -> int:
        """The number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def row_dim(self) -> int:
        """The dimension of the parameter that holds the output rows."""
        return {"conv1d": 1, "experts": 1, "experts_transposed": 2}.get(self.kind, 0)

    @property
    def expert_dim(self) -> int | None:
        """The dimension of the parameter that counts matrices, if there are several."""
        return 0 if self.kind.startswith("experts") else None

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(R, P, C) of one matrix of the weight."""
        if self.kind == "conv2d":
            return self.shape[0], self.shape[2] * self.shape[3], self.shape[1]
        rows, columns = self.shape[-2:]
        return (columns, 1, rows) if self.kind in ("conv1d", "experts_transposed") else (rows, 1, columns)

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """`tensor`, of the parameter's shape, as views of shape (R, P, C): one for each expert, one for others."""
        if self.kind == "conv2d":
            return [tensor.flatten(2).transpose(1, 2)]
        matrices = list(tensor) if tensor.ndim == 3 else [tensor]
        if self.kind in ("conv1d", "experts_transposed"):
            matrices = [matrix.t() for matrix in matrices]
        return [matrix[:, None, :] for matrix in matrices]


def find_layers(model: nn.Module) -> list[PrunableLayer]:
    """Every parameter of `model` that can be pruned, in the order of the modules: weights of Linear, GPT-2's Conv1D
    and Conv2d, and fused weights of experts.

    A weight shared by several modules is listed once, one tied to an embedding not at all. What lies in a module
    called after embeddings does not count as the model's body. Under PEFT the weights of the base are listed, by the
    names that they have there (`...base_layer.weight`), and nothing that an adapter adds.

    Example:
        >>> find_layers(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
        [PrunableLayer(name='1.weight', kind='linear', shape=(2, 4), in_body=True)]
    """
    parameters = dict(model.named_parameters())  # kept, so that no other parameter gets the id of one of these
    names = {id(parameter): name for name, parameter in parameters.items()}
    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    seen |= _adapter_parameters(model)
    body = _body_parameters(model)
    layers = []
    for path, module in model.named_modules():
        embeds = "embed" in path.lower()
        for parameter, kind in _prunable(module):
            if id(parameter) not in names:  # PEFT makes weights of a MultiheadAttention anew at every look
                continue
            # One byte means a quantized weight, whose zero is not the number's.
            if id(parameter) not in seen and parameter.is_floating_point() and parameter.element_size() > 1:
                seen.add(id(parameter))
                in_body = id(parameter) in body and not embeds
                layers.append(PrunableLayer(names[id(parameter)], kind, tuple(full_shape(parameter)), in_body))
    return layers


def _body_parameters(model: nn.Module) -> set[int]:
    """The parameters of the model's body: of `base_model` where a transformers model has one, less what computes its
    outputs (`get_output_embeddings`)."""
    if hasattr(model, "get_base_model"):  # PEFT, whose own `base_model` is the whole model with its head
        model = model.get_base_model()
    body = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outputs = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    return {id(parameter) for parameter in body.parameters()} - outputs


def _adapter_parameters(model: nn.Module) -> set[int]:
    """What PEFT puts beside the weights of the base: the matrices of its adapters, and of each module that it trains
    as a copy (`modules_to_save`) the original, which the copy stands in for."""
    found = set()
    for module in model.modules():
        if not hasattr(module, "adapter_layer_names"):  # what every layer of PEFT's has
            continue
        kept = getattr(module, "modules_to_save", None) or getattr(module, "base_layer", None)
        base = {id(parameter) for parameter in kept.parameters()} if isinstance(kept, nn.Module) else set()
        found |= {id(parameter) for parameter in module.parameters()} - base
    return found


def plain_name(name: str) -> str:
    """The name that a parameter has without PEFT.

    Example:
        >>> plain_name("base_model.model.encoder.query.base_layer.weight")
        'encoder.query.weight'
        >>> plain_name("base_model.model.score.modules_to_save.default.weight")
        'score.weight'
    """
    name = re.sub(r"(\.base_layer)+\.", ".", name.removeprefix("base_model.model."))
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _prunable(module: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The prunable parameters that `module` itself holds, each with its kind."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        # A parametrized weight is computed anew at each access: it is no parameter, and cannot be pruned in place.
        if isinstance(module._parameters.get("weight"), nn.Parameter):
            yield module.weight, "linear" if isinstance(module, nn.Linear) else "conv2d"
    elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        yield module.weight, "conv1d"
    elif type(module).__name__.endswith("Experts") or hasattr(module, "num_experts"):
        transposed = getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED_EXPERTS)
        kind = "experts_transposed" if transposed else "experts"
        for parameter in module.parameters(recurse=False):
            if len(full_shape(parameter)) == 3:
                yield parameter, kind


def select_layers(
    layers: Sequence[PrunableLayer], targets: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[list[PrunableLayer], list[str]]:
    """The layers that `targets` name (by default all of the model's body) less those that `exclude` names.

    A pattern is a glob (`*` also crosses dots) that the whole parameter name or module name matches, or `re:` and a
    regular expression that is found in one. The name may leave out the model's leading parts.

    Returns: the layers, in model order, and the faults found: patterns that are malformed or match nothing.

    Example:
        >>> layers = find_layers(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
        >>> [layer.name for layer in select_layers(layers, None, ["0"])[0]]
        ['1.weight']
    """
    errors: list[str] = []
    if targets is None:
        chosen = [layer for layer in layers if layer.in_body]
    else:
        chosen = _matching(layers, targets, "targets", errors)
    dropped = set(_matching(layers, exclude or (), "exclude", errors))
    chosen = [layer for layer in chosen if layer not in dropped]
    if not chosen and not errors:
        errors.append(f"nothing is left to prune: targets={targets}, exclude={exclude}.")
    return chosen, errors


def _matching(
    layers: Sequence[PrunableLayer], patterns: Sequence[str], field: str, errors: list[str]
) -> list[PrunableLayer]:
    found: set[PrunableLayer] = set()
    for pattern in patterns:
        try:
            hits = {layer for layer in layers if _matches(pattern, layer)}
        except re.error as error:
            errors.append(f'{field}: "{pattern}" is not a regular expression: {error}.')
            continue
        if not hits:
            names = [layer.module for layer in layers]
            errors.append(
                f'{field}: "{pattern}" matches none of the {len(layers)} prunable parameters '
                f"(such as {', '.join(names[:3]) or 'none'}).{nearest(pattern, names)}"
            )
        found |= hits
    return [layer for layer in layers if layer in found]


def _matches(pattern: str, layer: PrunableLayer) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], layer.name) is not None
    # Targets written for the model without an adapter also hold with one.
    plain = plain_name(layer.name)
    names = (layer.name, layer.module, plain, plain.rpartition(".")[0])
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern) for name in names)
