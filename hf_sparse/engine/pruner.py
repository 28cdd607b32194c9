"""The engine: observe -> update -> enforce. It has no clock and knows nothing of transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config.pruning import PruningConfig, PruningConfigError
from ..config.validation import input_errors
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
from ..model.layers import PrunableLayer, find_layers, select_layers
from ..numerics import count_zeros
from ..patterns import get_pattern
from ..reporting.report import SparsityReport
from ..statistics import all_finite
from .masks import MaskStore, unpack_mask
from .parameter_group import ParameterGroup


logger = logging.getLogger(__name__)


class Pruner:
    """Prunes one model by one config. Everything is decided from the weights, the sums of the criteria and the prune
    step that the caller names, so two pruners with the same state decide the same.

    Args:
        model: whose parameters are pruned, in place, under the names of `model.named_parameters()`.
        config: see `PruningConfig`.

    Raises:
        PruningConfigError: targets that match nothing, a weight claimed twice, a shape the pattern does not divide,
            frozen weights under a gradient criterion: all faults together.
        NotImplementedError: the parameters are sharded.

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
        everything, self.communicator = build_shards(dict(model.named_parameters()))
        self.groups, self.skipped = build_groups(model, config)
        names = [layer.name for group in self.groups for layer in group.layers]
        self._everything = everything
        self.shards = {name: everything[name] for name in names}
        self.parameters: dict[str, nn.Parameter] = {name: everything[name].parameter for name in names}
        for group in self.groups:
            group.communicator = self.communicator
        self.masks = self._new_masks()
        self._copies = MaskStore(
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
                    f'group "{group.name}" cannot reach its target: criterion "{group.options.criterion}" has seen no '
                    "finite gradient up to the last prune step. Prune later (prune_end), lower the loss scale, or use "
                    "a criterion without gradients."
                )
        self._compare()
        self.apply_masks()
        return self.report()

    def apply_masks(self) -> None:
        """What follows a change of masks: every process learns those of the whole weights that it has beside its
        shards, and zeros are written."""
        loads = []
        for name in self._copies:
            shard, bits = self.shards[name], self.masks.bits(name)
            everywhere = [(full_region(shard.shape),)] * self.communicator.world_size
            own = shard.local_views(bits) if shard.is_primary else []
            loads.append(Transfer(own, shard.primary_regions, everywhere, bits, packed=True))
        if loads:
            for name, (mask,) in zip(self._copies, redistribute(loads, self.communicator), strict=True):
                self._copies.bits(name).copy_(mask)
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
        copies = {name: self.shards[name].full_copy for name in self._copies}
        self._copies.enforce({name: copy for name, copy in copies.items() if copy is not None})

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
        zeros = dict(zip(self._everything, self._zeros(self._everything).tolist(), strict=True))
        sizes = {name: shard.shape.numel() for name, shard in self._everything.items()}
        return SparsityReport.from_counts(self.groups, zeros, sizes)

    # Saving and resuming

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a resumed run needs, as far as this process holds it: tensors (packed masks, sums of the criteria), and
        JSON values (which part of which weight they are of)."""
        tensors = {f"mask/{name}": self.masks.packed(name) for name in self.shards}
        counters = {}
        for group in self.groups:
            for name, stat in group.stats.items():
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
            group.stats.clear()
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


def build_groups(
    model: nn.Module, config: PruningConfig, inputs: bool = False
) -> tuple[list[ParameterGroup], list[str]]:
    """The groups of a config with the layers of a model. `inputs`: whether the inputs of the weights are observed.

    Returns: the groups, and the weights left out because their pattern does not divide them.

    Raises:
        PruningConfigError: with every fault.
    """
    everything = find_layers(model)
    errors: list[str] = []
    groups, skipped, owners = [], [], {}
    for name, options in config.resolve_groups(oneshot=inputs).items():
        where = f'group "{name}": ' if config.groups else ""
        layers, problems = select_layers(everything, options.targets, options.exclude)
        problems += [] if inputs else input_errors(options)
        errors += [where + problem for problem in problems]
        for layer in layers:
            if layer.name in owners:
                errors.append(
                    f'"{layer.name}" is claimed by the groups "{owners[layer.name]}" and "{name}": narrow one.'
                )
            owners[layer.name] = name
        fitting = _fitting(layers, options, where, errors, skipped)
        if fitting and not errors:
            try:
                groups.append(ParameterGroup(name, options, fitting))
            except ValueError as error:
                errors.append(f"{where}{error}")
        elif layers and not fitting and options.on_indivisible == "skip":
            errors.append(f'{where}pattern "{options.pattern}" divides none of the {len(layers)} selected weights.')
    if not errors:
        errors += _frozen_errors(model, groups)
    if errors:
        raise PruningConfigError(errors)
    return groups, skipped


def _fitting(
    layers: list[PrunableLayer], options: PruningConfig, where: str, errors: list[str], skipped: list[str]
) -> list[PrunableLayer]:
    """The layers that the pattern divides; the others are faults, or skipped, by name."""
    pattern, fitting = get_pattern(options.pattern), []
    for layer in layers:
        rows, _, columns = layer.matrix_shape
        problem = pattern.check(rows, columns)
        if not problem:
            fitting.append(layer)
        elif options.on_indivisible == "skip":
            skipped.append(layer.name)
        else:
            errors.append(
                f'{where}{problem}, but "{layer.name}" has {rows} outputs and {columns} inputs. Exclude it with '
                f'exclude=["{layer.module}"], set on_indivisible="skip", or choose pattern="unstructured".'
            )
    return fitting


def _frozen_errors(model: nn.Module, groups: list[ParameterGroup]) -> list[str]:
    parameters, errors = dict(model.named_parameters()), []
    for group in groups:
        frozen = [layer for layer in group.layers if not parameters[layer.name].requires_grad]
        if frozen and (group.requires_gradients or group.options.regrow):
            errors.append(
                f'criterion "{group.options.criterion}" needs gradients, but "{frozen[0].name}" is frozen '
                f"(requires_grad=False), one of {len(frozen)} such weights of {len(group.layers)}: exclude them, as "
                f'with exclude=["{frozen[0].module}"], or use criterion="magnitude".'
            )
    return errors
