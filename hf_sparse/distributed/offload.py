"""Weights that accelerate keeps on the CPU or on disk, and copies to a device for each forward.

accelerate's private `_hf_hook` attribute and the hooks' `weights_map` are read here only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def onload(module: nn.Module) -> Iterator[None]:
    """Context in which all offloaded weights of `module` are on their execution device; changes to them are kept.

    Other weights stay on their device. Does nothing where no weight is offloaded.
    """
    onloaded = []
    try:
        for child in module.modules():
            for hook in _offload_hooks(child):
                hook.pre_forward(child)
                hook.offload = False  # forwards inside the context neither onload nor offload
                onloaded.append((child, hook))
        if any(parameter.is_meta for parameter in module.parameters()):
            raise NotImplementedError(
                "some weights are on the meta device, and no hook of accelerate brings them: load the whole model, or "
                "use the version of accelerate that hf_sparse was tested with."
            )
        yield
    finally:
        for child, hook in onloaded:
            for name, parameter in child.named_parameters(recurse=hook.place_submodules):
                _store(hook.weights_map, name, parameter.detach())
            hook.offload = True
            hook.post_forward(child, None)


def iter_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and values of every parameter, tied ones once. Offloaded ones are onloaded module by module."""
    names = {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        direct = [name for name, _ in module.named_parameters(recurse=False)]
        hooks = _offload_hooks(module) if direct else []
        for hook in hooks:
            hook.pre_forward(module)
        for name in direct:
            full_name = f"{path}.{name}" if path else name
            if full_name in names:
                yield full_name, getattr(module, name).detach()
        for hook in hooks:
            hook.post_forward(module, None)


def input_device(model: nn.Module) -> torch.device:
    """Returns the device of the model's first weights, where its inputs must be."""
    for module in model.modules():
        for hook in _offload_hooks(module):
            device = hook.execution_device
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        for parameter in module.parameters(recurse=False):
            return parameter.device
    return torch.device("cpu")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are onloaded only for their module's forward."""
    return any(_offload_hooks(module) for module in model.modules())


def _offload_hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that onload the weights of `module`."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return [hook for hook in hooks if getattr(hook, "offload", False)]


def _store(weights_map: Any, name: str, tensor: torch.Tensor) -> None:
    """Writes a weight to where accelerate loads it from."""
    while hasattr(weights_map, "prefix"):  # a view of a larger map
        weights_map, name = weights_map.dataset, weights_map.prefix + name
    on_disk = getattr(weights_map, "index", {}).get(name)
    if on_disk is None or name in weights_map.state_dict:
        stored = weights_map[name]
        if stored.data_ptr() != tensor.data_ptr():
            stored.copy_(tensor)
    elif weights_map.save_folder is None:
        weights_map.state_dict[name] = tensor.cpu()
    else:
        from accelerate.utils import offload_weight

        offload_weight(tensor, name, weights_map.save_folder, weights_map.index)
