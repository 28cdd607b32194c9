"""Saves the final model of a trainer without its zero units: the checkpoints of the run keep their size and masks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..config import PruningConfig, PruningConfigError
from ..distributed import raise_on_all_ranks
from ..engine.resolve import removal_warnings, resolve_layers
from ..files import SHRINK_FILE
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
            f"shrink removes whole neurons, heads and layers, but the pattern is {patterns}, whose zeros cannot be "
            'removed: use pattern="neuron", or leave shrink out.'
        )
    elif hasattr(model, "peft_config"):
        errors.append(
            "shrink cannot remove units of a model with adapters: leave shrink out, and after training use "
            "merge_and_unload(model) and shrink(model)."
        )
    elif not isinstance(model, PreTrainedModel):
        errors.append(f"shrink needs a model of transformers, but {type(model).__name__} is none: leave shrink out.")
    else:
        uneven = [group for group in coupled if not (heterogeneous and group.pattern.has_layers)]
        errors = [f"shrink: {warning}" for warning in removal_warnings(model, uneven)]
        if any(group.pattern.has_layers for group in uneven) and errors:
            errors[-1] += " Or add heterogeneous=True: such a model opens only after `import hf_sparse`."
    if errors:
        raise PruningConfigError(errors)


class ShrinkMixin(TrainerBase):
    """The methods of `SparseTrainerMixin` that save a smaller model."""

    _save_options: tuple[bool, bool] | None = None
    """Of the save that is running: whether it writes a smaller model, and whether with layers of different sizes."""
    _shrink_error: Exception | None = None
    """What went wrong on this rank, until all ranks can raise."""
    is_output_shrunk = False
    """Whether the model in `output_dir` is smaller than that of the trainer."""

    @contextmanager
    def _shrinking(self, shrink: bool | None, heterogeneous: bool | None, directory: Path) -> Iterator[None]:
        """Within, `_save` writes a smaller model if `shrink` says so or, where it is None, the arguments or an earlier
        save. Afterwards all ranks raise if one could not."""
        enclosing = self._save_options  # of a save that pushes, for which Trainer saves again
        if shrink is None and enclosing is not None:
            shrink, heterogeneous = enclosing
        if shrink is None:
            shrink = not self.is_in_train and (getattr(self.args, "shrink", False) or self.is_output_shrunk)
        if heterogeneous is None:
            heterogeneous = getattr(self.args, "heterogeneous", False)
        self._save_options = shrink, heterogeneous
        try:
            yield
        finally:
            self._save_options = enclosing
        if shrink:
            error, self._shrink_error = self._shrink_error, None
            with raise_on_all_ranks(Exception):
                if error is not None:
                    raise error
        if directory == Path(str(self.args.output_dir)):
            self.is_output_shrunk = shrink

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's, which writes the whole model; then, where asked for, the main rank makes the files smaller."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        directory = Path(str(output_dir if output_dir is not None else self.args.output_dir))
        (directory / SHRINK_FILE).unlink(missing_ok=True)
        shrink, heterogeneous = self._save_options or (False, False)
        if not shrink:
            return
        model_class = _model_class(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        try:
            with loading_whole_weights(self.accelerator):
                plan = shrink_folder(directory, model_class, heterogeneous)
        except Exception as error:
            # Other ranks may wait for this one in what follows: all raise together at the end of `save_model`.
            self._shrink_error = error
            logger.error("%s has the whole model: it was not made smaller. %s", directory, error)
        else:
            logger.info("%s", plan)


def _model_class(model: nn.Module) -> Any:
    """Returns the class of a model, without what FSDP adds to it."""
    return next(base for base in type(model).__mro__ if not base.__module__.startswith("torch."))
