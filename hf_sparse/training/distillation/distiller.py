"""Distiller: the teacher, and the terms that it adds to the loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...config.distillation import DistillationOptions
from .hidden import hidden_loss
from .logits import IGNORED, ItemLoss, LogitsLoss


def forward_arguments(model: nn.Module) -> set[str] | None:
    """Returns the names of the arguments that the forward of a model takes; None where it takes any (**kwargs).

    Example:
        >>> forward_arguments(nn.Linear(2, 2))
        {'input'}
    """
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if takes_all else set(parameters)


class Distiller:
    """Runs the teacher of a run, and compares the outputs of a student with its own.

    The teacher is in evaluation mode, without gradients, whole on every rank, and part of no other module.

    Args:
        teacher: a model that takes the inputs of the student.
        options: of distillation.
        logits_loss: compares logits.
        label_names: inputs that hold labels, which the teacher does not get unless it makes its inputs of them.
    """

    def __init__(
        self, teacher: nn.Module, options: DistillationOptions, logits_loss: LogitsLoss, label_names: list[str]
    ):
        self.teacher, self.logits_loss = teacher.eval().requires_grad_(False), logits_loss
        self.alpha, self.hidden = float(options.distill_alpha or 0), float(options.distill_hidden or 0)
        config = getattr(teacher, "config", None)
        self._is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self._label_names = {*label_names, "shift_labels", "num_items_in_batch"}
        self._accepted = forward_arguments(teacher)
        self._dtype = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.float32)
        for part in {id(part): part for part in (config, _text_config(config)) if part is not None}.values():
            if hasattr(part, "use_cache"):
                part.use_cache = False

    @torch.no_grad()
    def run_teacher(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the outputs of the teacher for the inputs of a student."""
        makes_inputs = self._is_encoder_decoder and inputs.get("decoder_input_ids") is None
        kept = {
            name: value
            for name, value in inputs.items()
            if (name not in self._label_names or (makes_inputs and name == "labels"))
            and (self._accepted is None or name in self._accepted)
        }
        if not torch.is_autocast_enabled(self._device_type(inputs)):
            kept = {name: self._as_teacher(value) for name, value in kept.items()}
        if self.hidden:
            kept["output_hidden_states"] = True
        return self.teacher(**kept)

    def _as_teacher(self, value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if is_float else value

    @staticmethod
    def _device_type(inputs: Mapping[str, Any]) -> str:
        return next((value.device.type for value in inputs.values() if isinstance(value, Tensor)), "cpu")

    def compare_logits(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> ItemLoss:
        """Returns the loss between the logits of one batch."""
        return self.logits_loss(student, teacher, inputs)

    def compare_states(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> Tensor:
        """Returns the loss between the hidden states of one batch, mean over rows and layers: of encoder and decoder
        the mean of both.

        Raises:
            ValueError: the outputs have none, or of different sizes.
        """
        losses = []
        attention, labels = inputs.get("attention_mask"), inputs.get("labels")
        decoder = inputs.get("decoder_attention_mask")
        if decoder is None and labels is not None:
            decoder = labels != IGNORED
        masks = {"hidden_states": attention, "encoder_hidden_states": attention, "decoder_hidden_states": decoder}
        for name, mask in masks.items():
            if student.get(name) is not None and teacher.get(name) is not None:
                losses.append(hidden_loss(student[name], teacher[name], None if mask is None else mask != 0))
        if not losses:
            which = "student" if not any(student.get(name) is not None for name in masks) else "teacher"
            raise ValueError(
                f"`distill_hidden` compares hidden states, which the outputs of the {which} lack: its forward must "
                "take output_hidden_states, and compute_loss of the trainer must pass it on. Or set "
                "`distill_hidden=0`."
            )
        return torch.stack(losses).mean()


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else None
