"""Loads the teacher: whole, of its files, or a copy of the model that is trained."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...config.distillation import SELF, DistillationOptions
from ...hub.auto_classes import auto_class
from ..whole_weights import loading_whole_weights


class TeacherError(ValueError):
    """A teacher that a run cannot distill from: what is wrong, and the remedy."""


def copy_of(model: nn.Module, dtype: str | None) -> nn.Module:
    """Returns a copy of a model as it is before training, for a teacher."""
    teacher: Any = copy.deepcopy(model)
    teacher.__dict__.pop("forward", None)  # that of a model that was prepared for training would run the model itself
    if hasattr(teacher, "peft_config") and hasattr(teacher, "merge_and_unload"):
        teacher = teacher.merge_and_unload()
    return teacher if dtype is None else teacher.to(getattr(torch, dtype))


def load_teacher(
    options: DistillationOptions, student: nn.Module, accelerator: Any, token: str | None = None
) -> nn.Module:
    """Loads a teacher from its files, whole on every rank: of the class of the student, or where its architecture is
    another one, of the same Auto class.

    Raises:
        TeacherError: it cannot be loaded, or lacks weights, as those of a head for the task.
    """
    name, dtype = str(options.distill_teacher), options.distill_teacher_dtype
    arguments: dict[str, Any] = {"token": token} if token else {}
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, **arguments)
        if dtype is not None:
            arguments["dtype"] = getattr(torch, dtype)
        cls = _class_for(student, values.get("model_type"))
        with loading_whole_weights(accelerator), _without_broadcast():
            teacher, loading = cls.from_pretrained(name, output_loading_info=True, **arguments)
    except TeacherError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"`distill_teacher` is {name}, which cannot be loaded: {error} Give the folder or Hub name of a dense "
            f"model that is fine-tuned for this task, or {SELF}."
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise TeacherError(
            f"`distill_teacher` is {name}, whose files lack {len(missing)} weights of {type(teacher).__name__}, such "
            f'as "{missing[0]}", so that it knows nothing of this task: fine-tune it first, or give another one.'
        )
    return teacher


def _class_for(student: nn.Module, model_type: str | None) -> Any:
    """Returns the class that opens a teacher of the given type for the task of the student."""
    if not isinstance(student, PreTrainedModel):
        raise TeacherError(
            f"`distill_teacher` is loaded with the class of the model, but {type(student).__name__} is not a model of "
            "transformers: override load_teacher of the trainer to return the teacher."
        )
    # Without what FSDP adds to a class.
    cls = next(base for base in type(student).__mro__ if not base.__module__.startswith("torch."))
    if model_type == student.config.model_type:
        return cls
    auto = auto_class(cls.__name__)
    return cls if auto is None else getattr(transformers, auto)


@contextmanager
def _without_broadcast() -> Iterator[None]:
    """Within, `from_pretrained` loads the weights on every rank; under FSDP it may leave them to the first, for FSDP
    to send them, which it does for the student alone."""
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    given = os.environ.get(variable)
    os.environ[variable] = "false"
    try:
        yield
    finally:
        if given is None:
            del os.environ[variable]
        else:
            os.environ[variable] = given
