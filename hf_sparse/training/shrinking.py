"""Saves the final model of a trainer without its zero units: the checkpoints of the run keep their size and masks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..config import PruningConfig, PruningConfigError
from ..distributed import raise_on_all_ranks
from ..engine.resolve import removal_warnings, resolve_layers
from ..hub.shrinking import shrink_folder
from .whole_weights import loading_whole_weights


if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object


logger = logging.getLogger(__name__)


def check_shrink(model: nn.Module, config: PruningConfig, heterogeneous: bool) -> None:
    """Checks before training that what is pruned can be removed from the model.

    Args:
        model: to train, before it is wrapped.
        config: what is pruned.
        heterogeneous: whether layers may get different sizes.

    Raises:
        PruningConfigError: it cannot, with what to do instead.
    """
    groups, _ = resolve_layers(model, config)
    coupled = [group for group in groups if group.units]
    errors = []
    if not coupled:
        patterns = ", ".join(dict.fromkeys(f'"{group.pattern}"' for group in groups))
        errors.append(
            f"`shrink` removes whole neurons, heads and layers, but the pattern is {patterns}, whose zeros cannot be "
            'removed: use `pattern="neuron"`, or leave `shrink` out.'
        )
    elif hasattr(model, "peft_config"):
        errors.append(
            "`shrink` cannot remove units of a model with adapters: leave `shrink` out, and after training use "
            "merge_and_unload(model) and shrink(model)."
        )
    elif not isinstance(model, PreTrainedModel):
        errors.append(
            f"`shrink` needs a model of transformers, which {type(model).__name__} is not: leave `shrink` out."
        )
    else:
        uneven = [group for group in coupled if not (heterogeneous and group.pattern.has_layers)]
        errors = [f"`shrink`: {warning}" for warning in removal_warnings(model, uneven)]
        if any(group.pattern.has_layers for group in uneven) and errors:
            errors[-1] += " Or add `heterogeneous=True`: such a model opens only after `import hf_sparse`."
    if errors:
        raise PruningConfigError(errors)


class ShrinkMixin(TrainerBase):
    """The methods of `SparseTrainerMixin` that save a smaller model."""

    _save_options: tuple[bool, bool] | None = None
    """Of the save that is running: whether it writes a smaller model, and whether with layers of different sizes."""
    is_output_shrunk = False
    """Whether the model in `output_dir` is smaller than that of the trainer."""

    def _options_of_save(self, shrink: bool | None, heterogeneous: bool | None) -> tuple[bool, bool]:
        """Replaces None by what the arguments, an earlier save, or the save that encloses this one say."""
        if shrink is None and self._save_options is not None:  # of a save that pushes, for which Trainer saves again
            shrink, heterogeneous = self._save_options
        if shrink is None:
            shrink = not self.is_in_train and (getattr(self.args, "shrink", False) or self.is_output_shrunk)
        if heterogeneous is None:
            heterogeneous = getattr(self.args, "heterogeneous", False)
        return shrink, heterogeneous

    def _make_smaller(self, directory: Path, heterogeneous: bool) -> None:
        """Replaces the whole model in a folder by a smaller one, on the main rank. All ranks raise if it cannot."""
        model_class = _model_class(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        with raise_on_all_ranks(Exception):
            if self.args.should_save:
                try:
                    with loading_whole_weights(self.accelerator):
                        plan = shrink_folder(directory, model_class, heterogeneous)
                except Exception as error:
                    logger.error("%s has the whole model, because it could not be shrunk: %s", directory, error)
                    raise
                logger.info("%s", plan)


def _model_class(model: nn.Module) -> Any:
    """Returns the class of a model, without what FSDP adds to it."""
    return next(base for base in type(model).__mro__ if not base.__module__.startswith("torch."))
