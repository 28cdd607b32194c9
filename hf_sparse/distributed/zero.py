"""Shards of DeepSpeed ZeRO: a contiguous part of the flattened fp32 master weight on each rank.

Scores are computed from the master, which the optimizer updates; the model's copy computes and is exported. Both need
the zeros, or the next step or export would restore the weights.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

from .regions import regions_of_range
from .shards import Shard


class ZeroShard(Shard):
    """This rank's part of a parameter's master weight.

    ZeRO-1 and ZeRO-2 describe the part in the parameter's `_hp_mapping`, which is None on ranks that hold none of it.
    ZeRO-3 also keeps the same part of the model's copy, in `ds_tensor`; frozen parameters have no master there. The
    public `safe_get_local_fp32_param` does not serve: with an offloaded optimizer it returns a copy, and zeros written
    to it are lost.
    """

    is_split = True

    def __init__(self, parameter: torch.Tensor):
        super().__init__(parameter)
        self._gradient: torch.Tensor | None = None
        numel = math.prod(self.shape)
        if hasattr(parameter, "ds_id"):
            padded = self.parameter.ds_tensor.numel()  # all ranks hold as many entries, the last ones with padding
            first = min(numel, padded * torch.distributed.get_rank(self.parameter.ds_process_group))
            length = min(padded, numel - first)
        else:
            mapping = self.parameter._hp_mapping
            first = mapping.lp_fragment_address.start if mapping else 0
            length = mapping.lp_fragment_address.numel if mapping else 0
        self._length = length
        self.local_regions = regions_of_range(self.shape, first, first + length)

    @property
    def tensor(self) -> torch.Tensor:
        if not self._length:
            return torch.empty(0, dtype=torch.float32, device=self.parameter.device)
        if not hasattr(self.parameter, "ds_id"):
            return self.parameter._hp_mapping.hp_fragment.detach().view(-1)
        optimizer = getattr(self.parameter, "_z3_optimizer", None)
        if optimizer is not None:
            position = optimizer.grad_position.get(optimizer.get_param_id(self.parameter))
            if position is not None:
                group, first, _ = position
                return optimizer.fp32_partitioned_groups_flat[group].detach()[first : first + self._length]
        return self.parameter.ds_tensor.detach()[: self._length]

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient of `tensor`, only during the calls of `observe_zero_gradients`."""
        return self._gradient

    @property
    def keeps_gradient(self) -> bool:
        return False

    @property
    def replicas(self) -> list[torch.Tensor]:
        if self._length and hasattr(self.parameter, "ds_id"):
            return [self.parameter.ds_tensor.detach()[: self._length]]
        return []

    @property
    def has_full_copy(self) -> bool:
        return getattr(self.parameter, "ds_persist", True)

    @property
    def full_copy(self) -> torch.Tensor | None:
        # ZeRO-3 keeps small parameters whole on every rank, from the first step on.
        weight = self.parameter.detach()
        return weight if self.has_full_copy and weight.shape == self.shape else None

    @property
    def is_in_state_dict(self) -> bool:
        return not hasattr(self.parameter, "ds_id")

    def check_storage(self) -> None:
        is_partitioned = hasattr(self.parameter, "ds_id")
        if is_partitioned and self.parameter.requires_grad and not hasattr(self.parameter, "_z3_optimizer"):
            raise NotImplementedError(
                "this version of DeepSpeed does not show the master weights of ZeRO-3: use zero_optimization.stage 2, "
                "or the version that hf_sparse was tested with."
            )
        copies = self.replicas
        if self.full_copy is not None and len(self.local_regions) == 1:
            (region,) = self.local_regions
            copies.append(self.full_copy.reshape(-1)[region.flat_offset(self.shape) :][: region.numel])
        for copy in copies:
            if not torch.equal(self.tensor.to(copy.device, copy.dtype), copy):
                raise NotImplementedError(
                    "a master weight of ZeRO is not where DeepSpeed says: switch off round_robin_gradients and the "
                    "offloading of optimizer states to nvme."
                )


def is_deepspeed(optimizer: object) -> bool:
    """Whether an optimizer, as prepared by accelerate, is DeepSpeed's, which steps inside backward."""
    wrappers = sys.modules.get("accelerate.utils.deepspeed")  # imported wherever there is such an optimizer
    return wrappers is not None and isinstance(optimizer, wrappers.DeepSpeedOptimizerWrapper)


def observe_zero_gradients(optimizer: Any, shards: Iterable[Shard], observe: Callable[[], None]) -> Any:
    """Registers `observe` to be called before each step of ZeRO, while the gradients of its shards can be read.

    Gradients are reduced over ranks, unscaled and clipped. DeepSpeed updates the flat masters with an optimizer of
    torch, whose pre-step hooks run when the masters have their gradients, and do not run in steps that an overflow
    skips. DeepSpeed may step parameter groups one by one: then `observe` is called once for each, and the gradients of
    the other shards are None.

    Args:
        optimizer: as accelerate has wrapped it, see `is_deepspeed`.
        shards: of the parameters to observe; those that ZeRO does not split are ignored.

    Returns: the handle of the hook, to `remove()` it.

    Raises:
        NotImplementedError: the optimizer inside has no hooks.
    """
    inner = getattr(optimizer.optimizer, "optimizer", None)
    register = getattr(inner, "register_step_pre_hook", None)
    if register is None:
        raise NotImplementedError(
            f"DeepSpeed steps with {type(inner or optimizer.optimizer).__name__}, which gives no access to gradients: "
            'use a criterion and an algorithm without gradients, such as "magnitude" and "gradual", or an optimizer '
            "of torch.optim."
        )
    zero_shards = [shard for shard in shards if isinstance(shard, ZeroShard)]

    def before_step(inner: torch.optim.Optimizer, *_: Any) -> None:
        masters = [master for group in inner.param_groups for master in group["params"] if master.grad is not None]
        for shard, position in zip(zero_shards, positions_in_masters(zero_shards, masters), strict=True):
            if position is not None:
                master, entries = position
                shard._gradient = cast(torch.Tensor, master.grad).view(-1)[entries]
        try:
            observe()
        finally:
            for shard in zero_shards:
                shard._gradient = None

    return register(before_step)


def positions_in_masters(
    shards: Sequence[Shard], masters: Iterable[torch.Tensor]
) -> list[tuple[torch.Tensor, slice] | None]:
    """Returns where each shard lies in the flat masters that the optimizer inside DeepSpeed updates: the master, and
    the entries of the master when flattened. None for a shard that is empty or in none of these masters."""
    by_storage: dict[int, list[torch.Tensor]] = {}
    for master in masters:
        by_storage.setdefault(master.untyped_storage().data_ptr(), []).append(master)
    positions: list[tuple[torch.Tensor, slice] | None] = []
    for fragment in (shard.tensor for shard in shards):
        position = None
        for master in by_storage.get(fragment.untyped_storage().data_ptr(), ()) if len(fragment) else ():
            first = fragment.storage_offset() - master.storage_offset()
            if 0 <= first <= master.numel() - len(fragment):
                position = master, slice(first, first + len(fragment))
        positions.append(position)
    return positions
