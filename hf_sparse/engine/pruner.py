"""The engine: observe -> update -> enforce. It has no clock and knows nothing of transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import PruningConfig
from ..distributed import (
    Shard,
    ShardRegion,
    Transfer,
    build_shards,
    full_region,
    get_communicator,
    load_local_part,
    redistribute,
)
from ..numerics import count_zeros
from ..reporting.report import SparsityReport
from ..statistics import all_finite
from .masks import MaskStore, unpack_mask
from .parameter_group import ParameterGroup
from .resolve import resolve_layers


logger = logging.getLogger(__name__)


class Pruner:
    """Prunes the parameters of a model in three steps that the caller orders: observe, update, enforce.

    Every decision follows from the weights, the statistics and the prune step that the caller names, so that two
    pruners with the same state make the same decisions.

    Args:
        model: its parameters are pruned in place, under the names of `model.named_parameters()`.
        config: what to prune.

    Attributes:
        groups: the parameter groups.
        masks: the mask of each selected weight, as far as this rank holds it.
        skipped: names of weights that the pattern does not divide.

    Raises:
        PruningConfigError: all errors together: targets that match nothing, a weight in two groups, a shape that the
            pattern does not divide, frozen weights under a criterion that requires gradients.
        NotImplementedError: the parameters are sharded in an unsupported way.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.arange(8.0).view(2, 4) - 3)
        >>> pruner = Pruner(model, PruningConfig(target_sparsity=0.5, criterion="magnitude"))
        >>> pruner.update(1, 1).sparsity
        0.5
        >>> model[0].weight.data
        tensor([[-3.,  0.,  0.,  0.],
                [ 0.,  2.,  3.,  4.]])
    """

    def __init__(self, model: nn.Module, config: PruningConfig):
        self.model, self.config = model, config
        self._all_shards, self.communicator = build_shards(dict(model.named_parameters()))
        resolved, self.skipped = resolve_layers(model, config)
        self.groups = [ParameterGroup(group, self.communicator) for group in resolved]
        names = [layer.name for group in self.groups for layer in group.layers]
        self.shards = {name: self._all_shards[name] for name in names}
        self.parameters: dict[str, torch.Tensor] = {name: shard.parameter for name, shard in self.shards.items()}
        self.masks = self._new_masks()
        self._full_masks = MaskStore(
            {name: (shard.shape, shard.parameter.device) for name, shard in self.shards.items() if shard.has_full_copy}
        )
        self.refused_observations = 0
        if config.keep_zeros:
            for name, shard in self.shards.items():
                self.masks.replace(name, shard.tensor != 0)

    def _new_masks(self) -> MaskStore:
        tensors = {name: shard.tensor for name, shard in self.shards.items()}
        return MaskStore({name: (tensor.shape, tensor.device) for name, tensor in tensors.items()})

    # observe -> update -> enforce

    @property
    def observes(self) -> bool:
        """Whether any group's criterion sums up gradients."""
        return any(group.requires_gradients for group in self.groups)

    def observe(self) -> bool:
        """Add the gradients that the parameters hold now to the criteria's sums: once per optimizer step.

        Returns: False, with nothing added to any sum, when some gradient of an observing group is inf or nan.
        """
        groups = [group for group in self.groups if group.requires_gradients]
        names = [layer.name for group in groups for layer in group.layers]
        gradients = [self.shards[name].gradient for name in names]
        if self.communicator.any(not all_finite(gradient for gradient in gradients if gradient is not None)):
            self.refused_observations += 1
            return False
        for group in groups:
            group.observe(self.shards)
        return True

    def update(self, prune_step: int, total: int) -> SparsityReport:
        """Carry out prune step `prune_step` of `total`: new masks, and their zeros. All processes do so at once.

        Raises:
            RuntimeError: at the last prune step, a gradient criterion has never seen a finite gradient; or processes
                have decided differently about the same weights.
            ValueError: scores are nan.
        """
        for group in self.groups:
            if group.ready():
                group.prune(prune_step, total, self.shards, self.masks)
            elif prune_step < total:
                logger.warning(
                    'prune step %d of %d left out for group "%s": no finite gradient was seen yet.',
                    prune_step,
                    total,
                    group.name,
                )
            else:
                raise RuntimeError(
                    f'group "{group.name}" cannot reach its target: criterion "{group.options.criterion_name}" has '
                    "seen no finite gradient up to the last prune step. Prune later (prune_end), lower the loss "
                    "scale, or use a criterion without gradients."
                )
        self._compare()
        self.apply_masks()
        return self.report()

    def apply_masks(self) -> None:
        """What follows a change of masks: every process learns those of the whole weights that it has beside its
        shards, and zeros are written."""
        loads = []
        for name in self._full_masks:
            shard, bits = self.shards[name], self.masks.bits(name)
            everywhere = [(full_region(shard.shape),)] * self.communicator.world_size
            own = shard.local_views(bits) if shard.is_primary else []
            loads.append(Transfer(own, shard.primary_regions, everywhere, bits, packed=True))
        if loads:
            for name, (mask,) in zip(self._full_masks, redistribute(loads, self.communicator), strict=True):
                self._full_masks.bits(name).copy_(mask)
        self.enforce()

    def _compare(self) -> None:
        """See that all processes that hold the same weights have the same masks."""
        peers = get_communicator()
        if peers.world_size == 1:
            return
        names = list(self.shards)
        told = peers.all_gather(torch.tensor([self.masks.digest_of(name) for name in names], dtype=torch.int64))
        for name, digests in zip(names, torch.stack(told, dim=1).tolist(), strict=True):
            boxes = self.shards[name].regions_by_rank
            masks = set(zip(boxes * peers.world_size if len(boxes) == 1 else boxes, digests, strict=True))
            if len(masks) > len(set(boxes)):
                alike = [
                    [rank for rank in range(peers.world_size) if digests[rank] == digest] for digest in set(digests)
                ]
                raise RuntimeError(
                    f'processes disagree about the masks of "{name}": these ranks have one mask each: '
                    f"{', '.join(map(str, sorted(alike)))}. Their weights or gradients differ: look for a seed, a "
                    "device or a data-dependent branch that is not the same on every rank."
                )

    def enforce(self) -> None:
        """Write +0.0 wherever a weight is pruned."""
        self.masks.enforce({name: shard.tensor for name, shard in self.shards.items()})
        for name, shard in self.shards.items():
            for replica in shard.replicas:
                self.masks.enforce({name: replica})
        copies = {name: self.shards[name].full_copy for name in self._full_masks}
        self._full_masks.enforce({name: copy for name, copy in copies.items() if copy is not None})

    # Figures

    @property
    def target(self) -> float:
        """The share of the selected weights that the targets of all groups come to."""
        return self._mean(lambda group: group.target)

    def scheduled(self, prune_step: int, total: int) -> float:
        """The share that the schedules ask for after `prune_step` prune steps (0: before the first)."""
        return self._mean(lambda group: group.ratio(prune_step, total, self.masks) if prune_step else 0.0)

    def _mean(self, figure) -> float:
        sizes = [sum(layer.numel for layer in group.layers) for group in self.groups]
        return sum(size * figure(group) for size, group in zip(sizes, self.groups, strict=True)) / sum(sizes)

    def sparsity(self) -> float:
        """The share of the selected weights that is zero, counted in the weights, in all processes at once."""
        return self._zeros(self.shards).sum() / sum(shard.shape.numel() for shard in self.shards.values())

    def _zeros(self, shards: Mapping[str, Shard]) -> np.ndarray:
        """How many entries of each parameter are zero."""
        counts = [count_zeros(shard.tensor) if shard.is_primary else 0 for shard in shards.values()]
        return self.communicator.sum_counts(np.array(counts, dtype=np.int64))

    def report(self) -> SparsityReport:
        """The figures of the model as it is now, counted in all processes at once."""
        zeros = dict(zip(self._all_shards, self._zeros(self._all_shards).tolist(), strict=True))
        sizes = {name: shard.shape.numel() for name, shard in self._all_shards.items()}
        return SparsityReport.from_counts(self.groups, zeros, sizes)

    # Saving and resuming

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a resumed run needs, as far as this process holds it: tensors (packed masks, sums of the criteria), and
        JSON values (which part of which weight they are of)."""
        tensors = {f"mask/{name}": self.masks.packed(name) for name in self.shards}
        counters = {}
        for group in self.groups:
            for name, stat in group.statistics.items():
                tensors[f"stat/{name}"], counters[name] = stat.state()
        shapes = {name: list(shard.shape) for name, shard in self.shards.items()}
        boxes = {name: [[box.start, box.stop] for box in shard.local_regions] for name, shard in self.shards.items()}
        return tensors, {"shapes": shapes, "boxes": boxes, "counters": counters}

    def load_state_dict(self, *states: tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]) -> None:
        """Take up what was saved, by as many processes as there were: everything that each one's `state_dict` gave.
        The weights must be those that the masks were saved with.

        Raises:
            ValueError: masks of other weights, missing or misshapen: what is wrong is named, nothing is changed.
        """
        masks = self._new_masks()
        for name, shard in self.shards.items():
            mask = self._assemble("mask", name, states).to(shard.tensor.device)
            alive = int(torch.count_nonzero(shard.tensor[~mask]))
            # A checkpoint of an adapter lacks the frozen weights under it: what was pruned of them is pruned again.
            if alive and shard.parameter.requires_grad:
                raise ValueError(
                    f'the masks belong to other weights: {alive:,} of the pruned weights of "{name}" are not zero.'
                )
            masks.replace(name, mask)
        counters: dict[str, dict] = {}
        for _, values in states:
            for name, counts in values["counters"].items():
                # A process that held nothing of a weight has counted nothing.
                counters[name] = max(counts, counters.get(name, counts), key=lambda found: found.get("count", 0))
        sums = {}
        for layer in (layer for group in self.groups if group.requires_gradients for layer in group.layers):
            counts = counters.get(layer.name)
            observed = any(f"stat/{layer.name}" in tensors for tensors, _ in states)
            if observed and not {"count", "stale"} <= set(counts or ()):
                raise ValueError(f'the scores of "{layer.name}" are missing or misshapen: they lack their counters.')
            if counts is not None:
                sums[layer.name] = self._assemble("stat", layer.name, states), counts
        self.masks = masks
        for group in self.groups:
            group.statistics.clear()
            for name in [layer.name for layer in group.layers if layer.name in sums]:
                group.restore(name, self.shards[name].tensor, *sums[name])

    def _assemble(self, kind: str, name: str, states: Sequence) -> torch.Tensor:
        """This process's part of a mask, or of the sum of a criterion."""
        saved = []
        for tensors, values in states:
            boxes = [ShardRegion(tuple(start), tuple(stop)) for start, stop in values["boxes"].get(name, ())]
            saved.append((boxes, partial(_read, tensors, kind, name, sum(box.numel for box in boxes))))
        try:
            return load_local_part(self.shards[name], saved, torch.bool if kind == "mask" else torch.float32)
        except (ValueError, KeyError, RuntimeError) as error:
            what = 'mask of "{}" is' if kind == "mask" else 'scores of "{}" are'
            raise ValueError(f"the {what.format(name)} missing or misshapen: {error}") from error


def _read(tensors: Mapping[str, torch.Tensor], kind: str, name: str, count: int) -> torch.Tensor:
    tensor = tensors[f"{kind}/{name}"]
    return unpack_mask(tensor, count) if kind == "mask" else tensor
