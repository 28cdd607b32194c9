"""Weights that accelerate keeps on the CPU or on disk and brings to a device for each forward: to have them there for
a while, and to put them back changed."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def onload(module: nn.Module) -> Iterator[None]:
    """Within, all of `module`'s offloaded weights are where they are computed with, and changes of them last. Other
    weights stay where they are. Does nothing where nothing is offloaded."""
    loaded = []
    try:
        for part in module.modules():
            for hook in _offloading(part):
                hook.pre_forward(part)
                hook.offload = False  # so that a forward neither brings nor takes anything
                loaded.append((part, hook))
        yield
    finally:
        for part, hook in loaded:
            for name, parameter in part.named_parameters(recurse=hook.place_submodules):
                _put_back(hook.weights_map, name, parameter.detach())
            hook.offload = True
            hook.post_forward(part, None)


def iter_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and values of every parameter, tied ones once. What is offloaded is loaded module by module."""
    names = {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        hooks = _offloading(module) if own else []
        for hook in hooks:
            hook.pre_forward(module)
        for name in own:
            full = f"{path}.{name}" if path else name
            if full in names:
                yield full, getattr(module, name).detach()
        for hook in hooks:
            hook.post_forward(module, None)


def input_device(model: nn.Module) -> torch.device:
    """Where the model computes first, and so takes its inputs."""
    for module in model.modules():
        for hook in _offloading(module):
            device = hook.execution_device
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        for parameter in module.parameters(recurse=False):
            return parameter.device
    return torch.device("cpu")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights come only when they are computed with."""
    return any(_offloading(module) for module in model.modules())


def _offloading(module: nn.Module) -> list:
    """The hooks of accelerate that bring `module`'s weights."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return [hook for hook in hooks if getattr(hook, "offload", False) and hasattr(hook, "weights_map")]


def _put_back(weights: MutableMapping, name: str, tensor: torch.Tensor) -> None:
    """Store a weight where it came from."""
    while hasattr(weights, "prefix"):  # a view of a larger map
        weights, name = weights.dataset, weights.prefix + name
    on_disk = getattr(weights, "index", {}).get(name)
    if on_disk is None or name in weights.state_dict:
        stored = weights[name]
        if stored.data_ptr() != tensor.data_ptr():
            stored.copy_(tensor)
    elif weights.save_folder is None:
        weights.state_dict[name] = tensor.cpu()
    else:
        from accelerate.utils import offload_weight

        offload_weight(tensor, name, weights.save_folder, weights.index)
