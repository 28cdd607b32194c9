"""Shards of DeepSpeed ZeRO: a run of the flattened fp32 master weight on each process, and the model's copy of it.

The master is what is ranked and what the optimizer steps; the model's copy is what computes and what is exported. Both
must hold the zeros, or the next step or the next export would bring the weights back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from .regions import regions_of_range
from .shards import Shard


class ZeroShard(Shard):
    """A parameter whose master weight ZeRO has split.

    ZeRO-1 and ZeRO-2 say where by the parameter's `_hp_mapping`, which is None in a process that has none of it;
    ZeRO-3 keeps the same run of the model's copy in `ds_tensor`. A frozen parameter of ZeRO-3 has no master. Its
    public `safe_get_local_fp32_param` will not do: with an offloaded optimizer it gives a copy, and zeros written
    there are lost.
    """

    strategy = "DeepSpeed ZeRO"

    def __init__(self, parameter):
        super().__init__(parameter)
        self._gradient: torch.Tensor | None = None
        numel = math.prod(self.shape)
        if hasattr(parameter, "ds_id"):
            size = parameter.ds_tensor.numel()
            first = min(numel, size * torch.distributed.get_rank(parameter.ds_process_group))
            length = min(size, numel - first)  # what is beyond is padding
        else:
            mapping = parameter._hp_mapping
            first = mapping.lp_fragment_address.start if mapping else 0
            length = mapping.lp_fragment_address.numel if mapping else 0
        self._length = length
        self.local_regions = regions_of_range(self.shape, first, first + length)

    @property
    def tensor(self):
        if not self._length:
            return torch.empty(0, dtype=torch.float32, device=self.parameter.device)
        if not hasattr(self.parameter, "ds_id"):
            return self.parameter._hp_mapping.hp_fragment.detach().view(-1)
        zero = getattr(self.parameter, "_z3_optimizer", None)
        place = zero.grad_position.get(zero.get_param_id(self.parameter)) if zero is not None else None
        if place is None:
            return self.parameter.ds_tensor.detach()[: self._length]
        group, first, _ = place
        return zero.fp32_partitioned_groups_flat[group].detach()[first : first + self._length]

    @property
    def gradient(self):
        """Only there while `observe_zero_gradients` calls."""
        return self._gradient

    @property
    def replicas(self):
        if self._length and hasattr(self.parameter, "ds_id"):
            return [self.parameter.ds_tensor.detach()[: self._length]]
        return []

    @property
    def has_full_copy(self):
        return getattr(self.parameter, "ds_persist", True)

    @property
    def full_copy(self):
        # ZeRO-3 keeps small parameters whole in every process, from the first step on.
        weight = self.parameter.detach()
        return weight if self.has_full_copy and weight.shape == self.shape else None

    def check(self) -> None:
        """See that the master is the weight's.

        Raises:
            NotImplementedError: it is not: some of ZeRO's options keep it elsewhere.
        """
        same = list(self.replicas)
        if self.full_copy is not None:
            flat = self.full_copy.reshape(-1)
            if len(self.local_regions) == 1:
                (region,) = self.local_regions
                same.append(flat[region.flat_offset(self.shape) :][: region.numel])
        for tensor in same:
            if not torch.equal(self.tensor.to(tensor.device, tensor.dtype), tensor):
                raise NotImplementedError(
                    "a master weight of ZeRO is not where DeepSpeed says: switch off round_robin_gradients and the "
                    "offloading of optimizer states to nvme."
                )


def is_deepspeed(optimizer) -> bool:
    """Whether an optimizer, as accelerate has wrapped it, is DeepSpeed's, which steps inside backward."""
    return type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"


def observe_zero_gradients(optimizer, shards: Iterable[Shard], observe: Callable[[], None]):
    """Have `observe` called when ZeRO steps, with the gradients of its shards in place: reduced, unscaled, clipped.

    ZeRO steps the flat masters with an optimizer of torch, which calls its hooks before each step; then the masters
    have gradients. A step left out because of an overflow calls none. It may step one part of the parameters after the
    other: then `observe` is called for each, and the other shards' gradients are None.

    Returns: the hook, to be removed with `remove()`.

    Raises:
        NotImplementedError: the optimizer inside takes no hooks.
    """
    inner = getattr(optimizer.optimizer, "optimizer", None)
    if not hasattr(inner, "register_step_pre_hook"):
        raise NotImplementedError(
            f"DeepSpeed steps with {type(inner or optimizer.optimizer).__name__}, which shows no gradients: use a "
            'criterion without gradients, such as "magnitude", or an optimizer of torch.'
        )
    shards = [shard for shard in shards if isinstance(shard, ZeroShard)]

    def before_step(inner, *_):
        masters = {
            master.untyped_storage().data_ptr(): master
            for group in inner.param_groups
            for master in group["params"]
            if master.grad is not None
        }
        for shard in shards:
            fragment = shard.tensor
            master = masters.get(fragment.untyped_storage().data_ptr())
            first = fragment.storage_offset() - master.storage_offset() if master is not None else -1
            if len(fragment) and master is not None and 0 <= first <= master.numel() - len(fragment):
                shard._gradient = master.grad.view(-1)[first : first + len(fragment)]
        try:
            observe()
        finally:
            for shard in shards:
                shard._gradient = None

    return inner.register_step_pre_hook(before_step)
