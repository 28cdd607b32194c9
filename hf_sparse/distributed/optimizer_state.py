"""What an optimizer holds of each weight, as far as it is one number for each entry."""

from __future__ import annotations

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
        without state is left out: before the first step, and where this rank holds no entry of a weight.

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
    state = _innermost(optimizer).state
    flat = [name for name, shard in shards.items() if isinstance(shard, ZeroShard)]
    positions = positions_in_masters([shards[name] for name in flat], state if flat else ())
    found = {}
    for name, position in zip(flat, positions, strict=True):
        if position is not None:
            master, entries = position
            found[name] = {
                key: value.view(-1)[entries] for key, value in _elementwise(state[master], master.shape).items()
            }
    for name in shards.keys() - set(flat):
        found[name] = _elementwise(state.get(shards[name].parameter, {}), shards[name].tensor.shape)
    return {name: found[name] for name in shards if found.get(name)}


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
