"""What can be wrong with a one-shot run, told before anything is pruned."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ..calibration.batches import count_tokens, is_padded
from ..config import OneshotConfig, PruningConfigError
from ..distributed import build_shards, is_offloaded
from ..engine.parameter_group import ParameterGroup
from ..model.layers import PrunableLayer
from ..requires import Requires


logger = logging.getLogger(__name__)


def ranks_dense_model(group: ParameterGroup) -> bool:
    """Whether the group's masks are decided for all its layers together."""
    return group.options.ranks_all_layers


def requires_inputs(group: ParameterGroup) -> bool:
    """Whether the group's layers are pruned when what reaches them is known."""
    if not group.target:
        return False
    return bool(
        group.options.solver.requires & Requires.GRAM or _requires_norms(group) and not ranks_dense_model(group)
    )


def requires_dense_pass(group: ParameterGroup) -> bool:
    """Whether inputs in the dense model matter before anything is pruned."""
    outliers = bool(group.options.allocation.requires & Requires.OUTLIERS)
    return bool(group.target) and (outliers or (ranks_dense_model(group) and _requires_norms(group)))


def _requires_norms(group: ParameterGroup) -> bool:
    return group.criterion is not None and bool(group.criterion.requires & Requires.INPUT_NORMS)


def check_run(
    model: nn.Module, config: OneshotConfig, groups: Sequence[ParameterGroup], batches: Sequence[Any], processes: int
) -> None:
    """Raise with every fault, and warn of too little data.

    Raises:
        PruningConfigError: all faults together.
        NotImplementedError: the weights are split over processes.
    """
    offloaded = is_offloaded(model)  # such weights are on the meta device, and whole
    present = {name: weight for name, weight in model.named_parameters() if not (offloaded and weight.is_meta)}
    shards, _ = build_shards(present)
    split = next((name for name, shard in shards.items() if shard.is_split), None)
    if split is not None:
        raise NotImplementedError(
            f'"{split}" is split over processes: one-shot pruning takes whole weights, on each process or offloaded.'
        )
    errors = []
    if not any(group.target for group in groups):
        errors.append("there is nothing to prune: give target_sparsity, or a pattern that implies it.")
    errors += _data_errors(groups, batches, processes)
    observed = [
        layer for group in groups if requires_inputs(group) or requires_dense_pass(group) for layer in group.layers
    ]
    errors += _layer_errors(observed, config, batches)
    if offloaded:
        errors += _offload_errors(groups, config)
    errors += _rank_errors(config, groups, batches)
    if errors:
        raise PruningConfigError(errors)


def check_once(config: OneshotConfig, layers: Sequence[PrunableLayer], repeated: Collection[str]) -> None:
    """Raise a ValueError where forwards=1 would prune a weight before all its inputs have come. `repeated`: modules
    that are called more than once in a forward."""
    often = [layer.module for layer in layers if layer.module in repeated]
    if often and config.forwards == 1:
        raise ValueError(
            f'forwards=1 prunes a weight when its inputs come, but those of "{often[0]}" come several times in one '
            "forward: use forwards=2."
        )


def _data_errors(groups: Sequence[ParameterGroup], batches: Sequence[Any], processes: int) -> list[str]:
    for group in groups:
        if requires_inputs(group) or requires_dense_pass(group) or group.requires_gradients:
            what = f'criterion "{group.options.criterion_name}"'
            if group.criterion is None or group.options.solver.requires & Requires.GRAM:
                what = f'solver "{group.options.solver_name}"'
            if not batches:
                return [f"{what} needs calibration data, but there is none: give batches of it."]
            if len(batches) < processes:
                return [
                    f"{len(batches)} calibration batches are too few for {processes} processes: make smaller batches."
                ]
    return []


def _layer_errors(layers: Sequence[PrunableLayer], config: OneshotConfig, batches: Sequence[Any]) -> list[str]:
    errors = []
    convolved = [layer.module for layer in layers if layer.kind == "conv2d"]
    if convolved:
        errors.append(
            f'inputs of convolutions are not observed, but "{convolved[0]}" is one: leave it out with '
            f'exclude=["{convolved[0]}"], or use criterion="magnitude".'
        )
    experts = [layer.module for layer in layers if layer.expert_dim is not None]
    if experts and config.forwards == 1:
        errors.append("forwards=1 does not go with fused experts, which run one after the other: use forwards=2.")
    padded = next((index for index, batch in enumerate(batches) if is_padded(batch)), None)
    if experts and padded is not None:
        errors.append(
            f'padding cannot be told from tokens once they are dealt out to experts, as in "{experts[0]}", but '
            f"calibration batch {padded} has some: cut the data into blocks of one length."
        )
    return errors


def _offload_errors(groups: Sequence[ParameterGroup], config: OneshotConfig) -> list[str]:
    errors = []
    for group in groups:
        if group.requires_gradients:
            errors.append(
                f'criterion "{group.options.criterion_name}" needs gradients, but some weights are offloaded: use '
                'criterion="wanda", or a device that holds the model.'
            )
        elif ranks_dense_model(group):
            errors.append('scope "global" needs all weights at once, but some are offloaded: use scope=layer.')
    if not config.sequential:
        errors.append("sequential=False needs all weights at once, but some are offloaded: leave it out.")
    return errors


def _rank_errors(config: OneshotConfig, groups: Sequence[ParameterGroup], batches: Sequence[Any]) -> list[str]:
    """Too few tokens for a Gram matrix of full rank: what a solver then does is up to the dampening."""
    solved = [layer for group in groups if _uses_gram(group) for layer in group.layers if layer.expert_dim is None]
    tokens = sum(count_tokens(batch) for batch in batches)
    poor = [layer for layer in solved if layer.matrix_shape[2] > tokens > 0]
    if not poor:
        return []
    widest = max(poor, key=lambda layer: layer.matrix_shape[2])
    columns = widest.matrix_shape[2]
    text = (
        f"calibration data of {tokens:,} tokens is too little for Gram matrices of full rank: {len(poor)} weights "
        f'have more inputs, such as "{widest.name}" with {columns:,}.'
    )
    if any(_uses_gram(group) and group.options.solver.needs_full_rank for group in groups):
        return [
            f"{text} Give {columns:,} tokens or more, several times as many for good results, or a damping, as in "
            'solver_kwargs={"dampening": 0.01}.'
        ]
    logger.warning(
        "%s The solver's damping determines what they leave undetermined. More data improves the result.",
        text,
    )
    return []


def _uses_gram(group: ParameterGroup) -> bool:
    return bool(group.target) and bool(group.options.solver.requires & Requires.GRAM)
