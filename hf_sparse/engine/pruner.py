"""The engine: observe, update, enforce. It has no notion of time and does not depend on transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from ..reporting.report import SparsityReport
from ..statistics import ObservedGradients, all_finite
from .coupled_group import new_parameter_group
from .emptied_layers import EmptiedLayers
from .masks import MaskStore, unpack_mask, zero_counts
from .parameter_group import ParameterGroup
from .resolve import resolve_layers
from .saved_state import check_saved_state


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
        masks: the mask of each selected weight, and of biases that are pruned with them, as far as this rank holds it.
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
        self.groups = [new_parameter_group(group, self.communicator) for group in resolved]
        names = [name for group in resolved for name in group.parameter_shapes]
        self.shards = {name: self._all_shards[name] for name in names}
        self.parameters: dict[str, torch.Tensor] = {name: shard.parameter for name, shard in self.shards.items()}
        self.masks = self.new_masks()
        self._full_masks = MaskStore(
            {name: (shard.shape, shard.parameter.device) for name, shard in self.shards.items() if shard.has_full_copy}
        )
        self.refused_observations = 0
        self._emptied = EmptiedLayers(self.groups)
        if config.keep_zeros:
            for group in self.groups:
                group.keep_zeros(self.shards, self.masks)
            self._emptied.add(self._num_pruned())  # before pruning

    def new_masks(self) -> MaskStore:
        """Returns masks of the selected weights, as far as this rank holds them, that keep everything."""
        tensors = {name: shard.tensor for name, shard in self.shards.items()}
        return MaskStore({name: (tensor.shape, tensor.device) for name, tensor in tensors.items()})

    # observe -> update -> enforce

    @property
    def observes(self) -> bool:
        """Whether the criterion of any group sums over gradients."""
        return any(group.requires_gradients for group in self.groups)

    @property
    def reads_gradients(self) -> bool:
        """Whether the algorithm reads the gradients of the steps at which it prunes."""
        return any(group.dynamic is not None and group.dynamic.reads_gradients for group in self.groups)

    def observe(self) -> bool:
        """Adds the present gradients of the parameters to the statistics: once per optimizer step.

        Returns:
            False, with no statistic changed, when a gradient of an observing group is inf or nan.
        """
        groups = [group for group in self.groups if group.requires_gradients]
        gradients = [self.shards[layer.name].gradient for group in groups for layer in group.layers]
        if self.communicator.any(not all_finite(gradient for gradient in gradients if gradient is not None)):
            self.refused_observations += 1
            return False
        for group in groups:
            group.observe(self.shards)
        return True

    def start_sparse(self) -> None:
        """Prunes groups to their target before training, where the algorithm starts sparse. All ranks call this."""
        for group in self.groups:
            group.prune_initially(self.shards, self.masks)
        self._check_masks_across_ranks()
        self._emptied.warn(self._num_pruned(), "before training")
        self.apply_masks()

    def update(
        self, prune_step: int, total: int, gradients: Mapping[str, torch.Tensor | None] | None = None
    ) -> SparsityReport:
        """Carries out prune step `prune_step` of `total`, from 1, on all ranks at once: new masks, and their zeros.

        Args:
            prune_step, total: this prune step, from 1, of how many.
            gradients: of this step, of each shard's tensor by name, for algorithms that read them; left out, those
                that the parameters have.

        Returns:
            The sparsity of the model afterwards.

        Raises:
            RuntimeError: at the last prune step, a criterion that requires gradients has observed no finite gradient;
                or ranks have different masks for the same weights.
            ValueError: scores are nan.
        """
        if any(group.dynamic is not None for group in self.groups):
            self.enforce()  # Weights that return start at zero, not where the optimizer has moved them.
        if gradients is None:
            gradients = {name: shard.gradient for name, shard in self.shards.items()} if self.reads_gradients else {}
        for group in self.groups:
            if group.ready():
                group.prune(prune_step, total, self.shards, self.masks, gradients=gradients)
            elif prune_step < total:
                logger.warning(
                    'prune step %d of %d is skipped for group "%s": no finite gradient has been observed yet.',
                    prune_step,
                    total,
                    group.name,
                )
            else:
                raise RuntimeError(
                    f'group "{group.name}" cannot reach its target: criterion "{group.options.criterion_name}" has '
                    "observed no finite gradient up to the last prune step. Prune later (`prune_end`), lower the loss "
                    "scale, or use a criterion without gradients."
                )
        self._check_masks_across_ranks()
        self._emptied.warn(self._num_pruned(), f"after prune step {prune_step} of {total}")
        self.write([layer.name for group in self.groups if group.updates_weights for layer in group.layers])
        self.apply_masks()
        return self.report()

    def select(
        self, prune_step: int, total: int, scores: Mapping[str, torch.Tensor], masks: MaskStore | None = None
    ) -> None:
        """Carries out prune step `prune_step` of `total` by given scores: new masks, in which weights that were pruned
        may return, and their zeros. All ranks call this.

        Args:
            prune_step, total: this prune step, from 1, of how many.
            scores: float32 of each selected weight by name, of the shape of its shard's tensor; higher is kept.
            masks: from `new_masks`, which are replaced instead of the pruner's own; then no weight becomes zero.

        Raises:
            RuntimeError: ranks have different masks for the same weights.
            ValueError: scores are nan.
        """
        for group in self.groups:
            group.select(prune_step, total, scores, self.shards, self.masks if masks is None else masks)
        self._check_masks_across_ranks(masks)
        if masks is None:
            self._emptied.warn(self._num_pruned(), f"after prune step {prune_step} of {total}")
            self.apply_masks()

    @torch.no_grad()
    def write(self, names: Sequence[str]) -> None:
        """Copies the weights `names` from their shards, where they were changed, to the other tensors that hold their
        entries, on all ranks at once."""
        for name in names:
            shard = self.shards[name]
            for replica in shard.replicas:
                replica.copy_(shard.tensor)
            if name in self._full_masks:
                targets = [(full_region(shard.shape),)] * self.communicator.world_size
                views = shard.local_views(shard.tensor) if shard.is_primary else []
                transfer = Transfer(views, shard.primary_regions, targets, shard.tensor)
                ((whole,),) = redistribute([transfer], self.communicator)
                if (copy := shard.full_copy) is not None:
                    copy.copy_(whole)

    def replace_masks(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Replaces the masks of weights by given ones, and enforces all masks. All ranks call this.

        Args:
            masks: bool of each weight by name, of the shape of its shard's tensor; True is kept.

        Raises:
            RuntimeError: ranks have different masks for the same weights.
        """
        for name, mask in masks.items():
            self.masks.replace(name, mask)
        self._check_masks_across_ranks()
        self._emptied.warn(self._num_pruned(), "after masks were replaced")
        self.apply_masks()

    @torch.no_grad()
    def write_copies(self) -> None:
        """Writes the values of each shard to all copies of its weight, on all ranks at once."""
        transfers = []
        for shard in self.shards.values():
            for replica in shard.replicas:
                replica.copy_(shard.tensor)
        copied = [self.shards[name] for name in self._full_masks]
        for shard in copied:
            tensor = shard.tensor
            targets = [(full_region(shard.shape),)] * self.communicator.world_size
            views = shard.local_views(tensor) if shard.is_primary else []
            transfers.append(Transfer(views, shard.primary_regions, targets, tensor))
        if transfers:
            for shard, (values,) in zip(copied, redistribute(transfers, self.communicator), strict=True):
                if (copy := shard.full_copy) is not None:
                    copy.copy_(values)

    def apply_masks(self) -> None:
        """Enforces changed masks: distributes them to the ranks that hold full copies of sharded weights, and sets
        pruned weights to zero."""
        transfers = []
        for name in self._full_masks:
            shard, bits = self.shards[name], self.masks.bits(name)
            targets = [(full_region(shard.shape),)] * self.communicator.world_size
            views = shard.local_views(bits) if shard.is_primary else []
            transfers.append(Transfer(views, shard.primary_regions, targets, bits, packed=True))
        if transfers:
            for name, (mask,) in zip(self._full_masks, redistribute(transfers, self.communicator), strict=True):
                self._full_masks.bits(name).copy_(mask)
        self.enforce()

    def enforce(self, done: Collection[str] = ()) -> None:
        """Sets pruned weights to +0.0, wherever this rank holds them.

        Args:
            done: names of weights whose shard has its zeros already, and of which only copies are left.
        """
        # All layers in one call, which is one kernel on CUDA.
        self.masks.enforce({name: shard.tensor for name, shard in self.shards.items() if name not in done})
        for name, shard in self.shards.items():
            for replica in shard.replicas:
                self.masks.enforce({name: replica})
        copies = {name: self.shards[name].full_copy for name in self._full_masks}
        self._full_masks.enforce({name: copy for name, copy in copies.items() if copy is not None})

    def restore_zeros(self, names: Iterable[str] | None = None) -> int:
        """Sets pruned weights to +0.0 that other code has changed. Where none is changed, weights are only read.

        Args:
            names: of the weights; None means all.

        Returns:
            The number of changed weights that this rank counts: summed over ranks, each counts once.
        """
        total = 0
        for name in self.shards if names is None else names:
            revived = 0
            for tensor, masks in self._copies(name):
                count = masks.num_revived(name, tensor)
                if count:
                    masks.enforce({name: tensor})
                # A full copy exists on every rank; the other copies of this rank hold the same entries.
                counts_here = self.shards[name].is_primary if masks is self.masks else self.communicator.rank == 0
                revived = max(revived, count if counts_here else 0)
            total += revived
        return total

    def _copies(self, name: str) -> Iterator[tuple[torch.Tensor, MaskStore]]:
        """Yields all tensors of this rank with entries of a weight, and the masks of their shape."""
        shard = self.shards[name]
        for tensor in (shard.tensor, *shard.replicas):
            yield tensor, self.masks
        if name in self._full_masks and (copy := shard.full_copy) is not None:
            yield copy, self._full_masks

    def _check_masks_across_ranks(self, masks: MaskStore | None = None) -> None:
        """Raises RuntimeError when ranks that hold the same weights have different masks for them."""
        ranks, masks = get_communicator(), self.masks if masks is None else masks
        if ranks.world_size == 1:
            return
        names = list(self.shards)
        digests = ranks.all_gather(torch.tensor([masks.digest_of(name) for name in names], dtype=torch.int64))
        for name, by_rank in zip(names, torch.stack(digests, dim=1).tolist(), strict=True):
            regions = self.shards[name].regions_by_rank
            held = regions * ranks.world_size if len(regions) == 1 else regions
            if len(set(zip(held, by_rank, strict=True))) > len(set(regions)):
                equal = [[rank for rank, other in enumerate(by_rank) if other == digest] for digest in set(by_rank)]
                raise RuntimeError(
                    f'the masks of "{name}" differ between ranks; ranks with equal masks: '
                    f"{', '.join(map(str, sorted(equal)))}. Their weights or gradients differ: check for a seed, a "
                    "device or a data-dependent branch that is not the same on every rank."
                )

    # Sparsity

    @property
    def target(self) -> float:
        """The target sparsity of all selected weights: the mean over groups, weighted by their sizes."""
        return self._mean_over_weights(lambda group: group.target)

    def scheduled(self, prune_step: int, total: int) -> float:
        """Returns the scheduled sparsity of all selected weights after `prune_step` prune steps (0 at the start)."""
        return self._mean_over_weights(lambda group: group.ratio(prune_step, total, self.masks))

    def _mean_over_weights(self, value: Callable[[ParameterGroup], float]) -> float:
        sizes = [sum(layer.numel for layer in group.layers) for group in self.groups]
        return sum(size * value(group) for size, group in zip(sizes, self.groups, strict=True)) / sum(sizes)

    def sparsity(self) -> float:
        """Returns the fraction of zeros among the selected weights, counted in the weights, on all ranks at once."""
        weights = self._selected_weights
        return float(self._num_zeros(weights).sum() / sum(shard.shape.numel() for shard in weights.values()))

    def zeros_by_layer(self) -> dict[str, int]:
        """Returns the number of zeros of each selected weight, counted in the weights, on all ranks at once."""
        weights = self._selected_weights
        return dict(zip(weights, self._num_zeros(weights).tolist(), strict=True))

    def masked_sparsity(self) -> float:
        """Returns the fraction of the selected weights that the masks prune, on all ranks at once."""
        weights = self._selected_weights
        return sum(self._num_pruned().values()) / sum(shard.shape.numel() for shard in weights.values())

    def _num_pruned(self) -> dict[str, int]:
        """Returns how many entries of each selected weight the masks prune, by name, on all ranks at once."""
        weights = self._selected_weights
        bits = [self.masks.bits(name) if shard.is_primary else None for name, shard in weights.items()]
        return dict(zip(weights, self.communicator.sum_counts(zero_counts(bits)).tolist(), strict=True))

    @property
    def _selected_weights(self) -> dict[str, Shard]:
        return {layer.name: self.shards[layer.name] for group in self.groups for layer in group.layers}

    def _num_zeros(self, shards: Mapping[str, Shard]) -> np.ndarray:
        tensors = [shard.tensor if shard.is_primary else None for shard in shards.values()]
        return self.communicator.sum_counts(zero_counts(tensors))

    def report(self) -> SparsityReport:
        """Returns the sparsity of the model, counted in the weights, on all ranks at once."""
        zeros = dict(zip(self._all_shards, self._num_zeros(self._all_shards).tolist(), strict=True))
        sizes = {name: shard.shape.numel() for name, shard in self._all_shards.items()}
        return SparsityReport.from_counts(self.groups, zeros, sizes)

    # Saving and resuming

    def state_dict(
        self, more: Mapping[str, Mapping[str, torch.Tensor]] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns what a resumed run needs of this rank: tensors (packed masks, statistics), and JSON values (the
        shape of each weight, the regions that the tensors cover, and counters).

        Args:
            more: further tensors, kind -> parameter name -> float32 of the shape of its shard's tensor.
        """
        tensors = {f"mask/{name}": self.masks.packed(name) for name in self.shards}
        tensors |= {f"{kind}/{name}": tensor for kind in more or {} for name, tensor in (more or {})[kind].items()}
        counters = {}
        for group in self.groups:
            for name, statistic in group.statistics.items():
                parts, counters[name] = statistic.state()
                tensors |= {f"{kind}/{name}": part for kind, part in parts.items()}
        shapes = {name: list(shard.shape) for name, shard in self.shards.items()}
        regions = {
            name: [[region.start, region.stop] for region in shard.local_regions]
            for name, shard in self.shards.items()
        }
        return tensors, {"shapes": shapes, "boxes": regions, "counters": counters}

    def load_state_dict(self, *states: tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]) -> None:
        """Restores masks and statistics.

        Args:
            states: what `state_dict` returned on each rank of the run that saved them; there may have been any number.

        Raises:
            ValueError: masks or statistics are missing, nan, of another shape, or of other weights; nothing is
                changed.
        """
        for _, values in states:
            check_saved_state(values)
        masks = self.new_masks()
        for name, shard in self.shards.items():
            mask = self._load_local("mask", name, states).to(shard.tensor.device)
            nonzero = int(torch.count_nonzero(shard.tensor[~mask]))
            # A checkpoint of an adapter lacks the frozen base weights, whose zeros are enforced again.
            if nonzero and shard.parameter.requires_grad:
                raise ValueError(
                    f'the masks belong to other weights: {nonzero:,} of the pruned weights of "{name}" are not zero.'
                )
            masks.replace(name, mask)
        counters: dict[str, dict] = {}
        for _, values in states:
            for name, counts in values["counters"].items():
                # A rank that held no part of a weight has observed nothing of it.
                counters[name] = max(counts, counters.get(name, counts), key=lambda counter: counter.get("count", 0))
        statistics = {
            layer.name: (group, self._load_statistic(group, layer.name, states, counters.get(layer.name)))
            for group in self.groups
            if group.requires_gradients
            for layer in group.layers
        }
        self.masks = masks
        for group in self.groups:
            group.statistics.clear()
        for name, (group, statistic) in statistics.items():
            if statistic is not None:
                group.statistics[name] = statistic

    def load_tensors(
        self, kind: str, *states: tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Returns this rank's part of the tensors that `state_dict` was given beside its own, by parameter name.

        Args:
            kind: of the tensors.
            states: what `state_dict` returned on each rank of the run that saved them; there may have been any number.

        Raises:
            ValueError: a tensor is missing, or of another shape or dtype.
        """
        saved = {key.partition("/")[2] for tensors, _ in states for key in tensors if key.startswith(f"{kind}/")}
        names = [name for name in self.shards if name in saved]
        return {name: self._load_local(kind, name, states) for name in names}

    def _load_statistic(
        self, group: ParameterGroup, name: str, states: Sequence, saved: Mapping[str, int] | None
    ) -> ObservedGradients | None:
        """Returns the statistic of a weight, this rank's part; None where none is saved."""
        statistic = group.new_statistic(self.shards[name].tensor)
        kinds = statistic.saved_dtypes({"count": 1})
        if any(f"{kind}/{name}" in tensors for tensors, _ in states for kind in kinds):
            if not {"count", "stale"} <= set(saved or ()):
                raise ValueError(f'the scores of "{name}" are missing or misshapen: they lack their counters.')
        if saved is None:
            return None
        dtypes = statistic.saved_dtypes(saved)
        parts = {kind: self._load_local(kind, name, states, dtype) for kind, dtype in dtypes.items()}
        if any(bool(torch.isnan(part).any()) for part in parts.values()):
            raise ValueError(f'the scores of "{name}" are nan.')
        statistic.restore(parts, saved)
        return statistic

    def _load_local(self, kind: str, name: str, states: Sequence, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns this rank's part of a mask ("mask"), or of tensors of another kind, which are of `dtype`."""
        saved = []
        for tensors, values in states:
            regions = [ShardRegion(tuple(start), tuple(stop)) for start, stop in values["boxes"].get(name, ())]
            saved.append(
                (regions, partial(_read, tensors, kind, name, sum(region.numel for region in regions), dtype))
            )
        try:
            return load_local_part(self.shards[name], saved, torch.bool if kind == "mask" else dtype)
        except (ValueError, KeyError, RuntimeError) as error:
            what = {"mask": 'mask of "{}" is', "stat": 'scores of "{}" are'}.get(kind, f'"{kind}" of "{{}}" is')
            raise ValueError(f"the {what.format(name)} missing or misshapen: {error}") from error


def _read(tensors: Mapping[str, torch.Tensor], kind: str, name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
    tensor = tensors[f"{kind}/{name}"]
    if kind == "mask":
        return unpack_mask(tensor, count)
    if tensor.dtype != dtype:
        raise ValueError(f"they are {tensor.dtype} instead of {dtype}.")
    return tensor
