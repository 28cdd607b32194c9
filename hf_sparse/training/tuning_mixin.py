"""Training few parameters after pruning, as the option `tune` says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..config import PruningConfig, PruningConfigError
from ..distributed import build_shards
from ..engine.resolve import resolve_layers
from .callback import SparsityCallback
from .tuning import TUNINGS, Tuning
from .tuning.tuner import Tuner, nothing_trained


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


logger = logging.getLogger(__name__)

# Optimizers that step inside backward, before the gradients are complete.
_STEP_IN_BACKWARD = ("lomo", "layerwise")


class TuningMixin(TrainerBase):
    """The methods of `SparseTrainerMixin` that train few parameters."""

    sparsity_callback: SparsityCallback | None
    tuner: Tuner | None = None
    """What the latest `train` has trained; None if it trained all parameters."""
    _has_given_optimizer = False
    """Whether optimizer or learning rate scheduler were given to the trainer."""

    def _check_tuning(self) -> None:
        """Checks before training that the model and the run can be tuned, if the options say so.

        Raises:
            PruningConfigError: they cannot, with what to do instead.
        """
        callback = self.sparsity_callback
        if callback is None or callback.tuning is None:
            return
        tuning, config = callback.tuning, cast(PruningConfig, callback.config)
        name, model = TUNINGS.name_and_options(tuning)[0], cast(nn.Module, self.model)
        errors = [*_config_errors(name, config), *self._run_errors(name)]
        if any(hasattr(module, "adapter_layer_names") for module in model.modules()):
            errors.append(
                f'`tune` is "{name}", but the model has adapters: give the model without them, or leave `tune` out.'
            )
        elif not tuning.trained_parameters(model) and not tuning.updates_weights:
            errors.append(nothing_trained(tuning, model))
        errors += self._mode_errors(tuning, name)
        if errors:
            raise PruningConfigError(errors)

    def _run_errors(self, name: str) -> Iterator[str]:
        """Yields what is wrong with the optimizer and the activation checkpointing."""
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if self._has_given_optimizer:
            yield (
                f'`tune` is "{name}", but the trainer was given optimizers, which hold all parameters: leave '
                "optimizers out, and choose one by `optim` or optimizer_cls_and_kwargs."
            )
        if any(part in optimizer for part in _STEP_IN_BACKWARD):
            yield f'`tune` is "{name}", but `optim="{optimizer}"` steps inside backward: use `optim="adamw_torch"`.'
        for option in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if (getattr(self.args, option, None) or {}).get("use_reentrant"):
                yield (
                    f'`tune` is "{name}", but with reentrant checkpointing no gradients pass the frozen embeddings: '
                    f'set `{option}={{"use_reentrant": False}}`.'
                )

    def _mode_errors(self, tuning: Tuning, name: str) -> Iterator[str]:
        """Yields what is wrong with how weights are split over processes."""
        if self.is_deepspeed_enabled:
            yield f'`tune` is "{name}", which DeepSpeed does not support: use DDP (leave `deepspeed` out).'
        elif tuning.updates_weights and (self.is_fsdp_enabled or self._is_split()):
            yield (
                f'`tune` is "{name}", which needs whole weights, but the run splits them over processes: use DDP '
                '(leave `fsdp` and `distributed_config` out), or `tune="norms"` or `tune="biases"`.'
            )

    def _is_split(self) -> bool:
        shards, _ = build_shards(dict(cast(nn.Module, self.model).named_parameters()))
        return any(shard.is_split for shard in shards.values())

    @contextmanager
    def _tuning(self) -> Iterator[None]:
        """Within, training changes only what the options say. Optimizer and wrapped model of an earlier training,
        which know other parameters, are made anew."""
        callback, previous, self.tuner = self.sparsity_callback, self.tuner, None
        tuner = None
        if callback is not None and callback.tuning is not None:
            groups, _ = resolve_layers(cast(nn.Module, self.model), cast(PruningConfig, callback.config))
            layers = [layer for group in groups for layer in group.layers]
            self.tuner = callback.tuner = tuner = Tuner(callback.tuning, layers, self.args.seed)
        if previous is not None or tuner is not None:
            self.optimizer, self.model_wrapped = None, cast(nn.Module, self.model)
        try:
            yield
        finally:
            if callback is not None and tuner is not None:
                callback.tuner = None
                tuner.release(cast(nn.Module, self.model))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's `create_optimizer`, of the parameters that are trained, with those of weight updates as a group
        of their own without weight decay."""
        tuner = None if self.sparsity_callback is None else self.sparsity_callback.tuner
        added = [] if tuner is None else tuner.prepare(cast(nn.Module, self.model))
        optimizer = super().create_optimizer(*args, **kwargs)
        if added:
            optimizer.add_param_group({"params": added, "weight_decay": 0.0})
        if tuner is not None and self.is_world_process_zero():
            logger.info("tune: %s.", tuner.description)
        return optimizer


def _config_errors(name: str, config: PruningConfig) -> Iterator[str]:
    """Yields why the pruning config does not fit: pruned weights could hardly be compensated while most are frozen."""
    pruned = [group.name for group in config.resolve_groups().values() if group.target]
    if pruned:
        where = f" of group {pruned[0]}" if config.groups else ""
        yield (
            f'`tune` is "{name}", which trains a model that is pruned already, but the target{where} prunes more: '
            "prune first, and then train with `keep_zeros=True`, without `target_sparsity` and without a pattern that "
            "implies one."
        )
    elif not config.keep_zeros:
        yield f'`tune` is "{name}", which trains a model that is pruned already: set `keep_zeros=True`.'
