"""What an optimizer holds of each weight, as far as it is one number for each entry."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .dtensor import to_local
from .shards import Shard
from .zero import ZeroShard, positions_in_masters


def optimizer_state(optimizer: Any, shards: Mapping[str, Shard]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the elementwise state of an optimizer for this rank's part of each weight.

    The tensors are views of the optimizer's own memory: writing to them changes its next step. Numbers of steps,
    factored moments and quantized moments are left out, because they have no entry for each weight. DeepSpeed ZeRO
    keeps the state of flat masters, from which the entries of the shard are taken.

    Args:
        optimizer: of torch, or as accelerate has wrapped it.
        shards: of the weights, by name.

    Returns:
        Parameter name -> key of the state, such as "exp_avg_sq" -> tensor of the shape of `shard.tensor`. A weight
        without state is left out: before the first step, and where this rank holds no entry of a weight. A weight
        whose state is not elementwise has {}.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> optimizer_state(optimizer, {"weight": Shard(weight)})
        {}
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer_state(optimizer, {"weight": Shard(weight)})["weight"]["exp_avg_sq"]
        tensor([0.0010, 0.0010])
    """
    state, found = _innermost(optimizer).state, {}
    flat = [name for name, shard in shards.items() if isinstance(shard, ZeroShard)]
    positions = positions_in_masters([shards[name] for name in flat], state if flat else ())
    for name, position in zip(flat, positions, strict=True):
        if position is not None and (own := state[position[0]]):
            master, entries = position
            found[name] = {key: value.view(-1)[entries] for key, value in _elementwise(own, master.shape).items()}
    for name in shards.keys() - set(flat):
        if own := state.get(shards[name].parameter):
            found[name] = _elementwise(own, shards[name].tensor.shape)
    return {name: found[name] for name in shards if name in found}


_ZERO_AT_START = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"}
"""Keys of the state of optimizers, those of the Adam family, whose values are 0 before the first step."""


@torch.no_grad()
def reset_optimizer_state(optimizer: Any) -> None:
    """Resets an optimizer to before its first step. Its learning rates and other options stay.

    State that starts at zero is set to zero in place, since a sharded optimizer that has none would be given some when
    it is saved. All other state is deleted: the optimizer makes it anew at its next step.

    Args:
        optimizer: of torch, or as accelerate has wrapped it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> reset_optimizer_state(optimizer)
        >>> optimizer.state[weight]
        {'step': tensor(0.), 'exp_avg': tensor([0., 0.]), 'exp_avg_sq': tensor([0., 0.])}
    """
    for state in _innermost(optimizer).state.values():
        if state.keys() <= _ZERO_AT_START and all(_is_plain(value) for value in state.values()):
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    to_local(value).zero_()
                else:
                    state[key] = type(value)(0)
        else:
            state.clear()


def _is_plain(value: Any) -> bool:
    """Whether a value is a number or a tensor of numbers: subclasses of tensors are quantized."""
    return isinstance(value, (int, float)) or type(to_local(value)) is torch.Tensor


def elementwise_state_keys(optimizer: Any) -> set[str] | None:
    """Returns the keys of the elementwise state that an optimizer will hold of a matrix, before its first step.

    A new optimizer of the same class and options takes one step on a matrix that is large enough to be quantized, as
    optimizers of 8 bits do from 4,096 entries on. None if there is no such optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> sorted(elementwise_state_keys(torch.optim.AdamW([weight])))
        ['exp_avg', 'exp_avg_sq']
    """
    inner = _innermost(optimizer)
    devices = [parameter.device for group in inner.param_groups for parameter in group["params"]]
    weight = torch.nn.Parameter(torch.zeros(128, 128, device=devices[0] if devices else "cpu"))
    weight.grad = torch.ones_like(weight)
    taken = inspect.signature(type(inner)).parameters
    options = {name: value for name, value in inner.defaults.items() if name in taken}
    try:
        probe = type(inner)([weight], **options)
        probe.step()
    except Exception:  # A class of others: whatever it raises, nothing is known about it.
        return None
    return set(optimizer_state(probe, {"": Shard(weight)}).get("", {}))


def optimizer_name(optimizer: Any) -> str:
    """Returns the class name of the optimizer of torch inside the wrappers of accelerate and DeepSpeed."""
    return type(_innermost(optimizer)).__name__


def _innermost(optimizer: Any) -> Any:
    """Returns the optimizer of torch inside the wrappers of accelerate and DeepSpeed."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def _elementwise(state: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Tensor]:
    """Returns the local part of each tensor of a parameter's state that has a floating-point entry for each weight."""
    tensors = {key: to_local(value) for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {
        key: tensor
        for key, tensor in tensors.items()
        # Subclasses of tensors are quantized: their memory holds no plain numbers.
        if tensor.shape == shape and tensor.is_floating_point() and type(tensor) is torch.Tensor
    }
