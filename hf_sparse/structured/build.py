"""Builds the smaller model from its config, on the meta device, and assigns the remaining weights to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..distributed import full_shape
from .reduction import Reduction, ShrinkError


def check_model(model: nn.Module) -> None:
    """Raises a ShrinkError if a model is not one of transformers, or its weights are not whole."""
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ShrinkError(f"{name} has adapters of PEFT: merge them first, with hf_sparse.merge_and_unload(model).")
    if not hasattr(model, "save_pretrained") or not hasattr(getattr(model, "config", None), "model_type"):
        raise ShrinkError(
            f"{name} is not a model of transformers. Pass the model inside a wrapper: model.module of DDP, "
            "model[0].auto_model of a SentenceTransformer."
        )
    if getattr(model, "is_quantized", False):
        raise ShrinkError(f"the weights of {name} are quantized: shrink the model first, then quantize it.")
    for parameter_name, parameter in model.named_parameters():
        is_split = hasattr(parameter, "full_tensor") or tuple(full_shape(parameter)) != tuple(parameter.shape)
        if parameter.is_meta or is_split:
            where = "on the meta device" if parameter.is_meta else "split over processes"
            raise ShrinkError(
                f'"{parameter_name}" is {where}: save the whole model and load it with from_pretrained, on one device.'
            )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ShrinkError(f"{name} is split over devices: load it on one device, without `device_map`.")


class SmallerModel:
    """The structure of the smaller model, on the meta device, and where its tensors come from.

    Args:
        reduction: what is removed.

    Raises:
        ShrinkError: the config builds other parameters than those that remain.
    """

    def __init__(self, reduction: Reduction):
        self._reduction, self._dense = reduction, reduction.model
        with torch.device("meta"):
            self.model: Any = type(self._dense)(reduction.config)
        self._first_names = {id(tensor): name for name, tensor in _tensors(self._dense, unique=True)}
        tensors = dict(_tensors(self._dense))
        self._sources = {
            smaller: tensors[name] for name in tensors if (smaller := smaller_name(name, reduction.blocks)) is not None
        }
        self._leave_out_modules()
        self._check()

    def _leave_out_modules(self) -> None:
        """Sets modules to None that are None in the dense model, such as a pooler that was not asked for."""
        for name in [name for name, _ in self.model.named_parameters() if name not in self._sources]:
            owner: Any = self.model
            other: Any = self._dense
            for part in name.split("."):
                if getattr(other, part, self) is None:
                    setattr(owner, part, None)
                owner, other = getattr(owner, part, None), getattr(other, part, None)

    def _check(self) -> None:
        built = {name: tuple(tensor.shape) for name, tensor in self.model.named_parameters(remove_duplicate=False)}
        parameters = {name for name, _ in self._dense.named_parameters(remove_duplicate=False)}
        remaining = {
            smaller: self._reduction.entries.shape(self._first_names[id(self._sources[smaller])])
            for name in parameters
            if (smaller := smaller_name(name, self._reduction.blocks)) is not None
        }
        wrong = [name for name in {**built, **remaining} if built.get(name) != remaining.get(name)]
        if self._reduction.is_uneven:
            wrong = [name for name in wrong if name not in built or name not in remaining]
        if wrong:
            name = wrong[0]
            changes = ", ".join(f"{change.field}={change.after}" for change in self._reduction.changes)
            raise ShrinkError(
                f'the config cannot express the smaller model: "{name}" would be {remaining.get(name, "absent")}, but '
                f"a {type(self._dense).__name__} of its config has {built.get(name, 'none')} ({len(wrong)} parameters "
                f"differ). Changed fields: {changes or 'none'}."
            )

    def count(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the number of parameters and of bytes, each before and after. Tied parameters count once."""
        before = list(self._dense.parameters())
        after = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            source = self._sources[name]
            shape = torch.Size(self._reduction.entries.shape(self._first_names[id(source)]))
            after[id(source)] = shape.numel(), shape.numel() * source.element_size()
        parameters = sum(parameter.numel() for parameter in before), sum(number for number, _ in after.values())
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in before)
        return parameters, (num_bytes, sum(size for _, size in after.values()))

    def assign(self) -> nn.Module:
        """Returns the smaller model with copies of the remaining weights. Tied parameters stay tied."""
        copies: dict[int, torch.Tensor] = {}
        for name, _ in list(_tensors(self.model)):
            if name not in self._sources:
                raise ShrinkError(f'"{name}" is a buffer that only the smaller model has.')
            source = self._sources[name]
            if id(source) not in copies:
                new = self._reduction.entries.select(self._first_names[id(source)], source.detach())
                is_parameter = isinstance(source, nn.Parameter)
                copies[id(source)] = nn.Parameter(new, source.requires_grad) if is_parameter else new
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, copies[id(source)])
        self._copy_constants()
        self.model.train(self._dense.training)
        if getattr(self._dense, "generation_config", None) is not None:
            self.model.generation_config = copy.deepcopy(self._dense.generation_config)
        return self.model

    def _copy_constants(self) -> None:
        """Copies tensors that a module holds as plain attributes."""
        for name, module in self._dense.named_modules():
            smaller = smaller_name(name, self._reduction.blocks)
            constants = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
            if constants and smaller is not None:
                for key, value in constants.items():
                    setattr(self.model.get_submodule(smaller), key, value.clone())


def _tensors(model: nn.Module, unique: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters and buffers of a model with their names: with each of them, unless `unique`."""
    yield from model.named_parameters(remove_duplicate=unique)
    yield from model.named_buffers(remove_duplicate=unique)


def smaller_name(name: str, blocks: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns the name in the smaller model of a parameter or module; None if its block is removed.

    Example:
        >>> [smaller_name(f"h.{number}.mlp", {"h": (0, 2)}) for number in range(3)]
        ['h.0.mlp', None, 'h.1.mlp']
    """
    for blocks_name, kept in blocks.items():
        if name.startswith(f"{blocks_name}."):
            number, dot, rest = name.removeprefix(f"{blocks_name}.").partition(".")
            return f"{blocks_name}.{kept.index(int(number))}{dot}{rest}" if int(number) in kept else None
    return name
