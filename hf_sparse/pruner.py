"""The engine: observe -> update -> enforce. It has no clock and knows nothing of transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import PruningConfig, PruningConfigError
from .group import Group
from .masks import MaskStore, digest_of
from .patterns import get_pattern
from .report import LayerReport, SparsityReport, count_zeros
from .sharding import check_supported
from .stats import all_finite
from .targets import Layer, find_layers, select_layers


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
        self.groups, self.skipped = build_groups(model, config)
        parameters = dict(model.named_parameters())
        names = [layer.name for group in self.groups for layer in group.layers]
        self.parameters: dict[str, nn.Parameter] = {name: parameters[name] for name in names}
        check_supported(self.parameters)
        self.masks = MaskStore({name: (weight.shape, weight.device) for name, weight in self.parameters.items()})
        self.refused_observations = 0
        if config.keep_zeros:
            for name, weight in self.parameters.items():
                self.masks.replace(name, weight.detach() != 0)

    # observe -> update -> enforce

    @property
    def observes(self) -> bool:
        """Whether any group's criterion sums up gradients."""
        return any(group.observes_gradients for group in self.groups)

    def observe(self) -> bool:
        """Add the gradients that the parameters hold now to the criteria's sums: once per optimizer step.

        Returns: False, with nothing added to any sum, when some gradient of an observing group is inf or nan.
        """
        groups = [group for group in self.groups if group.observes_gradients]
        names = [layer.name for group in groups for layer in group.layers]
        gradients = [self.parameters[name].grad for name in names]
        if not all_finite(gradient for gradient in gradients if gradient is not None):
            self.refused_observations += 1
            return False
        for group in groups:
            group.observe(self.parameters)
        return True

    def update(self, prune_step: int, total: int) -> SparsityReport:
        """Carry out prune step `prune_step` of `total`: new masks, and their zeros.

        Raises:
            RuntimeError: at the last prune step, a gradient criterion has never seen a finite gradient.
            ValueError: scores are nan.
        """
        for group in self.groups:
            if group.ready():
                group.prune(prune_step, total, self.parameters, self.masks)
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
        self.enforce()
        return self.report()

    def enforce(self) -> None:
        """Write +0.0 wherever a weight is pruned."""
        self.masks.enforce(self.parameters)

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
        """The share of the selected weights that is zero, counted in the weights."""
        zeros = sum(count_zeros(weight) for weight in self.parameters.values())
        return zeros / sum(weight.numel() for weight in self.parameters.values())

    def report(self) -> SparsityReport:
        """The figures of the model as it is now."""
        layers = tuple(
            LayerReport(
                name=layer.name,
                group=group.name,
                pattern=group.options.pattern,
                shape=layer.shape,
                weights=layer.numel,
                zeros=count_zeros(self.parameters[layer.name]),
            )
            for group in self.groups
            for layer in group.layers
        )
        zeros = {layer.name: layer.zeros for layer in layers}
        everything = dict(self.model.named_parameters())
        others = sum(count_zeros(weight) for name, weight in everything.items() if name not in zeros)
        count = sum(weight.numel() for weight in everything.values())
        return SparsityReport(layers, count, others + sum(zeros.values()), self.target)

    # Saving and resuming

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a resumed run needs: tensors (packed masks, sums of the criteria) and JSON values."""
        packed = self.masks.packed()
        tensors = {f"mask/{name}": mask for name, mask in packed.items()}
        counters = {}
        for group in self.groups:
            for name, stat in group.stats.items():
                tensors[f"stat/{name}"], counters[name] = stat.state()
        shapes = {name: list(weight.shape) for name, weight in self.parameters.items()}
        return tensors, {"shapes": shapes, "digest": digest_of(packed, shapes), "counters": counters}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. The weights must be those that the masks were saved with.

        Raises:
            ValueError: masks damaged, of other weights, missing or misshapen: what is wrong is named, nothing is
                changed.
        """
        packed = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("mask/")}
        masks = MaskStore({name: (weight.shape, weight.device) for name, weight in self.parameters.items()})
        masks.unpack(packed)
        if masks.digest() != values["digest"]:
            raise ValueError("the masks are damaged: their digest is not the one saved with them.")
        for name, weight in self.parameters.items():
            alive = int(torch.count_nonzero(weight.detach()[masks.bits(name) == 0]))
            if alive:
                raise ValueError(
                    f'the masks belong to other weights: {alive:,} of the pruned weights of "{name}" are not zero.'
                )
        sums = self._check_sums(tensors, values["counters"])
        self.masks = masks
        for group in self.groups:
            group.stats.clear()
            for layer in group.layers:
                if layer.name in sums:
                    group.restore(layer.name, self.parameters[layer.name], *sums[layer.name])

    def _check_sums(self, tensors: Mapping[str, torch.Tensor], counters: Mapping[str, Any]) -> dict[str, tuple]:
        """The saved sum and counters of every weight that has some."""
        sums = {}
        for layer in (layer for group in self.groups if group.observes_gradients for layer in group.layers):
            total, counts = tensors.get(f"stat/{layer.name}"), counters.get(layer.name)
            if total is None and counts is None:
                continue
            if total is None or tuple(total.shape) != layer.shape or not {"count", "stale"} <= set(counts or ()):
                raise ValueError(f'the scores of "{layer.name}" are missing or misshapen.')
            sums[layer.name] = total, counts
        return sums


def build_groups(model: nn.Module, config: PruningConfig) -> tuple[list[Group], list[str]]:
    """The groups of a config with the layers of a model.

    Returns: the groups, and the weights left out because their pattern does not divide them.

    Raises:
        PruningConfigError: with every fault.
    """
    everything = find_layers(model)
    faults: list[str] = []
    groups, skipped, owners = [], [], {}
    for name, options in config.resolve_groups().items():
        where = f'group "{name}": ' if config.groups else ""
        layers, problems = select_layers(everything, options.targets, options.exclude)
        faults += [where + problem for problem in problems]
        for layer in layers:
            if layer.name in owners:
                faults.append(
                    f'"{layer.name}" is claimed by the groups "{owners[layer.name]}" and "{name}": narrow one.'
                )
            owners[layer.name] = name
        fitting = _fitting(layers, options, where, faults, skipped)
        if fitting and not faults:
            try:
                groups.append(Group(name, options, fitting))
            except ValueError as error:
                faults.append(f"{where}{error}")
        elif layers and not fitting and options.on_indivisible == "skip":
            faults.append(f'{where}pattern "{options.pattern}" divides none of the {len(layers)} selected weights.')
    if not faults:
        faults += _frozen_faults(model, groups)
    if faults:
        raise PruningConfigError(faults)
    return groups, skipped


def _fitting(
    layers: list[Layer], options: PruningConfig, where: str, faults: list[str], skipped: list[str]
) -> list[Layer]:
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
            faults.append(
                f'{where}{problem}, but "{layer.name}" has {rows} outputs and {columns} inputs. Exclude it with '
                f'exclude=["{layer.module}"], set on_indivisible="skip", or choose pattern="unstructured".'
            )
    return fitting


def _frozen_faults(model: nn.Module, groups: list[Group]) -> list[str]:
    parameters = dict(model.named_parameters())
    return [
        f'criterion "{group.options.criterion}" needs gradients, but "{layer.name}" is frozen (requires_grad=False): '
        f'exclude it with exclude=["{layer.module}"] or use criterion="magnitude".'
        for group in groups
        if group.observes_gradients or group.options.regrow
        for layer in group.layers
        if not parameters[layer.name].requires_grad
    ]
