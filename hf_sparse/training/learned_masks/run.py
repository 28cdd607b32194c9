"""LearnedMaskRun: learned masks at work in one training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from ...algorithms import LearnedMask
from ...algorithms.learned_mask import MaskContext, Theta
from ...distributed import is_deepspeed
from ...engine.masks import zero_counts
from ...engine.parameter_group import ParameterGroup
from ...engine.pruned_values import restore_pruned, store_pruned
from ...engine.pruner import Pruner
from ...engine.saved_state import is_count
from ...engine.unreached_layers import warn_of_unreached
from ...model.layers import PrunableLayer
from ...schedulers import PruningSchedule
from ...selection.row_blocks import keeps_units_whole
from ...statistics import all_finite
from ..algorithm_run import AlgorithmRun
from .parts import WeightParts, noise_key
from .prior import read_masks
from .theta import TrainedTensors, computed


logger = logging.getLogger(__name__)


class LearnedMaskRun(AlgorithmRun):
    """Trains theta of a `LearnedMask`, and writes the weights w = f(theta, W) that follow from it.

    Before the optimizer steps, the gradient of w is pulled back to theta, which is updated, and to W, which takes the
    place of w, with its gradient, if the optimizer trains it. After the step w is written again. Gradients that are
    not finite enter nothing. The last prune step leaves W with exact zeros, and an ordinary training of what is kept.

    Raises:
        NotImplementedError: the run splits weights in a way that the algorithm does not support.
    """

    requires_gradients = True

    def __init__(self, pruner: Pruner, schedule: PruningSchedule, optimizer: Any, seed: int):
        super().__init__(pruner, schedule, optimizer, seed)
        groups = [group for group in pruner.groups if group.target]
        self.algorithm = cast(LearnedMask, groups[0].options.algorithm)
        self.group_of = {layer.name: group for group in groups for layer in group.layers}
        self.weights = [self._weight_parts(group, layer) for group in groups for layer in group.layers]
        self.num_weights = sum(weight.layer.numel for weight in self.weights)
        self._check_modes(is_deepspeed(optimizer))
        self.trained = TrainedTensors(self.weights)
        self.is_final = False
        """Whether the last prune step has happened, after which masks stay as they are."""
        # Of W: all of it where w is something else everywhere, or what zeros have replaced.
        self._dense: dict[str, torch.Tensor] = {}
        self._pruned: dict[str, torch.Tensor] = {}
        self._holds_dense: set[str] = set()  # weights whose tensor is W, between `before_step` and `after_step`
        self._totals: tuple[int, dict[str, torch.Tensor]] = (0, {})
        self._updated_step = self._step = 0

    def _weight_parts(self, group: ParameterGroup, layer: PrunableLayer) -> WeightParts:
        together = group.pattern.unit_rows(layer.matrix_shape[0]) if self.algorithm.needs_whole_units else 1
        return WeightParts(layer, self.pruner.shards[layer.name], together)

    def _check_modes(self, uses_deepspeed: bool) -> None:
        name = self.pruner.groups[0].options.algorithm_name
        if uses_deepspeed and (self.algorithm.is_soft or not self.algorithm.trains_weights):
            raise NotImplementedError(
                f'`algorithm` "{name}" writes weights that DeepSpeed would overwrite from its own copies: use FSDP2 '
                "or DDP (leave `deepspeed` out)."
            )
        if not self.algorithm.needs_whole_units:
            return
        for weight in self.weights:
            pattern, (rows, _, columns) = self.group_of[weight.name].pattern, weight.layer.matrix_shape
            units = pattern.unit_rows(rows), pattern.unit_columns(columns)
            if not keeps_units_whole(weight.layer, weight.shard, *units):
                raise NotImplementedError(
                    f'`algorithm` "{name}" learns masks of whole units, but "{weight.name}" is split within units of '
                    f'`pattern` "{pattern}": exclude it, use fewer processes, or DDP.'
                )

    # Around the optimizer step

    @torch.no_grad()
    def start(self) -> None:
        if self.algorithm.is_soft:
            self._dense = {weight.name: weight.shard.tensor.clone() for weight in self.weights}
        first = self._first_masks()
        theta = {}
        for weight in self.weights:
            by_part = []
            context_of = partial(MaskContext, **self._context(weight, 1, None))
            parts = zip(weight.views(weight.shard.tensor), weight.views(first[weight.name]), strict=True)
            for index, (dense, mask) in enumerate(parts):
                context = context_of(noise=partial(self._noise, weight, index, 1))
                by_part.append(self._checked(self.algorithm.init(computed(dense), mask, context), dense, weight))
            theta[weight.name] = {key: weight.join([part[key] for part in by_part]) for key in by_part[0]}
        self.trained.start(theta)
        if not self.algorithm.is_soft:
            self._pruned = {weight.name: torch.zeros_like(weight.shard.tensor) for weight in self.weights}
        self._write(1)

    def _first_masks(self) -> dict[str, torch.Tensor]:
        """Returns the masks from which theta starts: those of zeros, or, where the algorithm starts from a mask at the
        target sparsity, those of its prior or of the largest magnitudes."""
        masks = self.pruner.masks
        if not self.algorithm.starts_from_mask:
            return {weight.name: masks[weight.name] for weight in self.weights}
        if self.algorithm.prior is not None:
            return read_masks(self.algorithm.prior, self.weights, self.pruner.communicator)
        kept = {weight.name: masks[weight.name] for weight in self.weights}
        scores = {weight.name: weight.shard.tensor.abs().float() for weight in self.weights}
        self.pruner.select(1, 1, scores)
        first = {name: masks[name] for name in kept}
        for weight in self.weights:
            weight.shard.tensor.copy_(self._dense[weight.name])
            masks.replace(weight.name, kept[weight.name])
        return first

    def _checked(self, theta: Theta, dense: torch.Tensor, weight: WeightParts) -> Theta:
        for key, value in theta.items():
            if value.shape != dense.shape:
                raise ValueError(
                    f'{type(self.algorithm).__name__}.init returns "{key}" of shape {tuple(value.shape)} for a part '
                    f'of "{weight.name}" of shape {tuple(dense.shape)}: they must be equal.'
                )
        return theta

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        found = {weight.name: weight.shard.gradient for weight in self.weights}
        gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
        if not self.is_final:
            is_finite = not self.pruner.communicator.any(not all_finite(gradients.values()))
            if is_finite:
                self._update(gradients, step)
            elif self.algorithm.trains_weights:
                self._restore_dense(gradients)
            if not is_finite:
                logger.info("step %d: gradients are not finite, so learned masks are not updated.", step)
        if not self.algorithm.trains_weights and not self.is_final:
            # The model is frozen: an optimizer leaves parameters without gradients alone.
            for parameter in self.pruner.model.parameters():
                parameter.grad = None

    def _update(self, gradients: Mapping[str, torch.Tensor], step: int) -> None:
        """Updates theta, and replaces the gradients of w by those of W, if W is trained."""
        if self._updated_step != step:  # DeepSpeed may call this several times in a step
            self._updated_step = step
            self.trained.updates += 1
        totals = self._totals_at(step)
        learning_rate = self.algorithm.learning_rate * self.learning_rate_factor
        for weight in self.weights:
            if weight.name not in gradients:
                continue
            gradient = gradients[weight.name]
            if self.algorithm.trains_weights:
                self._restore_dense([weight.name])
            parts = weight.views(gradient)
            for index, arguments in enumerate(self._parts(weight, step, totals)):
                theta, dense, mask, context = arguments
                own = computed(parts[index])
                of_theta, of_dense = self.algorithm.pull_back(theta, dense, mask, own, context)
                self.trained.update(weight, index, of_theta, learning_rate)
                if of_dense is not None and of_dense is not parts[index]:
                    parts[index].copy_(of_dense)
            if self.algorithm.trains_weights and not gradient.is_contiguous():
                weight.write(gradient, parts)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self._step = step
        if self.is_final:
            self.pruner.enforce()
            return
        prune_step = self.schedule.prune_step(step)
        is_last = prune_step == self.schedule.total
        if prune_step is None or (self.algorithm.is_soft and not is_last):
            stored = self._store_dense()
            self._write(step + 1)
            self.pruner.enforce(done=stored)
            return
        self._prune(prune_step, step)

    def _prune(self, prune_step: int, step: int) -> None:
        """Selects new masks, on all ranks at once, and leaves W with their zeros in all memory of the weights."""
        if prune_step == self.schedule.total:
            name = self.pruner.groups[0].options.algorithm_name
            warn_of_unreached(self.trained.untrained(), f'`algorithm` "{name}"', "learns no mask of {}")
        if self.algorithm.is_soft:
            self._store_dense()
        # Copies hold W where the optimizer has just written it, as DeepSpeed does but for steps that it skips.
        lacking = {weight.name for weight in self.weights if weight.shard.tensor.numel()} - self._holds_dense
        copies_lack = self.pruner.communicator.any(bool(lacking))
        self._restore_dense(lacking)
        masks, scores = self._early_masks(prune_step, step), {}
        if masks is None:
            totals = self._totals_at(step + 1)
            for weight in self.weights:
                of_parts = [
                    self.algorithm.scores(theta, dense, context)
                    for theta, dense, _, context in self._parts(weight, step + 1, totals)
                ]
                scores[weight.name] = weight.join(of_parts).float()
        for name, values in self._pruned.items():
            values.copy_(self.pruner.shards[name].tensor)
        if masks is None:
            self.pruner.select(prune_step, self.schedule.total, scores)
        else:
            self.pruner.replace_masks(masks)
        for name, values in self._pruned.items():
            values.masked_fill_(self.pruner.masks[name], 0)
        if copies_lack:
            self.pruner.write_copies()
        self._holds_dense.clear()
        if prune_step == self.schedule.total:
            self._end_learning()

    def _early_masks(self, prune_step: int, step: int) -> dict[str, torch.Tensor] | None:
        """Returns the masks that the algorithm defines by itself, where it does and they have at least the scheduled
        sparsity and at most the target; None at the last prune step."""
        if prune_step == self.schedule.total:
            return None
        masks, totals = {}, self._totals_at(step + 1)
        for weight in self.weights:
            parts = [
                self.algorithm.early_mask(theta, dense, context)
                for theta, dense, _, context in self._parts(weight, step + 1, totals)
            ]
            given = [part for part in parts if part is not None]
            if len(given) < len(parts):
                return None
            masks[weight.name] = weight.join(given)
        kept = [masks[weight.name] if weight.shard.is_primary else None for weight in self.weights]
        pruned = int(self.pruner.communicator.sum_counts(zero_counts(kept)).sum())
        groups = dict.fromkeys(self.group_of.values())
        scheduled = sum(
            group.ratio(prune_step, self.schedule.total, self.pruner.masks) * layer.numel
            for group in groups
            for layer in group.layers
        )
        most = sum(group.target * layer.numel for group in groups for layer in group.layers)
        return masks if scheduled <= pruned <= most else None

    def _end_learning(self) -> None:
        """Drops what the final masks no longer need."""
        self.is_final = True
        self.trained, self._dense, self._pruned = TrainedTensors([]), {}, {}

    # W and w

    def _restore_dense(self, names: Iterable[str]) -> None:
        """Writes W into the tensors of these weights, where w is."""
        for name in names:
            if name not in self._holds_dense:
                tensor = self.pruner.shards[name].tensor
                if self.algorithm.is_soft:
                    tensor.copy_(self._dense[name])
                else:
                    restore_pruned(tensor, self._pruned[name])
                self._holds_dense.add(name)

    def _store_dense(self) -> set[str]:
        """Takes W from the tensors that hold it. Returns those that have zeros now."""
        stored, self._holds_dense = self._holds_dense, set()
        for name in stored:
            tensor = self.pruner.shards[name].tensor
            if self.algorithm.is_soft:
                self._dense[name].copy_(tensor)
            else:
                store_pruned(tensor, self._pruned[name], self.pruner.masks.bits(name))
        return set() if self.algorithm.is_soft else stored

    def _write(self, step: int) -> None:
        """Writes w for the forward pass of a step. Where w is W with zeros, these are enforced afterwards."""
        if not self.algorithm.is_soft:
            return
        totals = self._totals_at(step)
        for weight in self.weights:
            weight.write(
                weight.shard.tensor,
                [self.algorithm.weight(*arguments) for arguments in self._parts(weight, step, totals)],
            )

    # Arguments of the algorithm

    def _parts(
        self, weight: WeightParts, step: int, totals: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[Theta, torch.Tensor, torch.Tensor, MaskContext]]:
        """Yields theta, W, mask and context of each part of a weight."""
        dense = weight.views(self._dense.get(weight.name, weight.shard.tensor))
        lacks = not self.algorithm.is_soft and weight.name not in self._holds_dense
        pruned = weight.views(self._pruned[weight.name]) if lacks else []
        bits = weight.views(self.pruner.masks.bits(weight.name))
        context_of = partial(MaskContext, **self._context(weight, step, totals.get(weight.name)))
        for index, theta in enumerate(self.trained.of_parts(weight)):
            own = dense[index]
            if lacks:
                own = own.clone()
                restore_pruned(own, pruned[index])
            # 0 and 1: the memory of a bool.
            mask = (bits[index] & 1).view(torch.bool)
            yield theta, computed(own), mask, context_of(noise=partial(self._noise, weight, index, step))

    def _context(self, weight: WeightParts, step: int, totals: torch.Tensor | None) -> dict[str, Any]:
        """Returns the fields of `MaskContext` that all parts of a weight share."""
        group, schedule = self.group_of[weight.name], self.schedule
        done, length = schedule.done(step - 1), schedule.end - schedule.start
        linear = (step - schedule.start) / length if length else float(step > schedule.end)
        return {
            "step": step,
            "progress": min(1.0, max(0.0, linear)),
            "sparsity": group.ratio(done, schedule.total, self.pruner.masks) if done else 0.0,
            "target": group.target,
            "num_weights": self.num_weights,
            "pattern": group.pattern,
            "totals": totals,
        }

    def _noise(self, weight: WeightParts, part: int, step: int, index: int) -> torch.Tensor:
        return weight.noise(part, noise_key(self.seed, step, index))

    def _totals_at(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the totals of each weight by name, if the algorithm has any. All ranks call this."""
        if type(self.algorithm).totals is LearnedMask.totals:
            return {}
        if self._totals[0] != step:
            self._totals = step, self._sum_totals(step)
        return self._totals[1]

    def _sum_totals(self, step: int) -> dict[str, torch.Tensor]:
        sums: dict[Any, np.ndarray] = {}
        for weight in self.weights:
            parts = [
                cast(torch.Tensor, self.algorithm.totals(*arguments)) for arguments in self._parts(weight, step, {})
            ]
            own = torch.stack(parts).sum(0).cpu().numpy()
            key = self._competition(weight)
            sums[key] = sums.get(key, 0) + (own if weight.shard.is_primary else np.zeros_like(own))
        ends = np.cumsum([len(own) for own in sums.values()])[:-1]
        summed = np.split(self.pruner.communicator.sum_counts(np.concatenate(list(sums.values()))), ends)
        by_key = dict(zip(sums, summed, strict=True))
        return {
            weight.name: torch.from_numpy(by_key[self._competition(weight)]).to(weight.shard.tensor.device)
            for weight in self.weights
        }

    def _competition(self, weight: WeightParts) -> ParameterGroup | WeightParts:
        """Returns what holds the units that compete with those of a weight."""
        group = self.group_of[weight.name]
        return group if group.scope == "global" else weight

    # Logs and checkpoints

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        if self.is_final:
            return {}
        sums: dict[str, float] = {}
        totals = self._totals_at(self._step + 1)
        for weight in self.weights:
            for arguments in self._parts(weight, self._step + 1, totals):
                for name, value in self.algorithm.metrics(*arguments).items():
                    sums[name] = sums.get(name, 0.0) + (float(value) if weight.shard.is_primary else 0.0)
        together = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64)
        if len(together):
            self.pruner.communicator.all_reduce(together)
        return {name: float(f"{value:.6g}") for name, value in zip(sorted(sums), together.tolist(), strict=True)}

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        if self.is_final:
            return {}
        dense = self._dense if self.algorithm.is_soft else self._pruned
        return {**self.trained.state(), "dense": {name: tensor.float() for name, tensor in dense.items()}}

    def values(self) -> dict[str, Any]:
        if self.is_final:
            return {"is_final": True}
        return {"is_final": False, "updates": self.trained.updates, "tensors": self.trained.keys}

    @torch.no_grad()
    def load(self, read: Callable[[str], dict[str, torch.Tensor]], values: Mapping[str, Any]) -> None:
        if values.get("is_final") is True:
            self._end_learning()
            return
        updates, keys = values.get("updates"), values.get("tensors")
        if not is_count(updates) or not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("the state of the learned masks is missing or damaged.")
        self.trained.load(read, keys, cast(int, updates))
        tensors, saved = {weight.name: weight.shard.tensor for weight in self.weights}, read("dense")
        if missing := tensors.keys() - saved.keys():
            raise ValueError(f'"dense" of "{min(missing)}" is missing.')
        loaded = {name: saved[name].to(tensor) for name, tensor in tensors.items()}
        self._dense, self._pruned = (loaded, {}) if self.algorithm.is_soft else ({}, loaded)
