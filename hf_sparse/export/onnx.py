"""Exports a model to ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..optional_packages import require
from .inputs import input_names, random_inputs


ONNX_FILE = "model.onnx"


class _Positional(nn.Module):
    """A model with positional inputs and a tuple of tensors as output, without a cache."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(named_outputs(self.model, dict(zip(self.names, inputs, strict=True))).values())


def named_outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the outputs of a model that are tensors, by name, such as `logits` (B, T, V)."""
    options: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    outputs = model(**inputs, return_dict=True, **options)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def to_onnx(model: PreTrainedModel, path: str | Path) -> None:
    """Writes a model as an ONNX file, with any batch size and, for texts, any length.

    Inputs have the names of the model's forward (`input_ids` and `attention_mask`, or `pixel_values`), outputs those
    of its result. A causal language model computes the logits of whole texts, without a cache.

    Args:
        model: a model of transformers, in evaluation mode on the CPU.
        path: the file to write. Weights of more than 2 GB are written beside it.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model is an encoder-decoder, or takes neither texts nor images.
    """
    require("export", "onnx", "onnxscript")
    names = input_names(model)
    # The sizes are not 1, which torch.export would take for constant.
    length = min(16, getattr(model.config, "max_position_embeddings", 16))
    inputs = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in random_inputs(model, 2, length).items()
    }
    dims = {0: "batch"} if names == ["pixel_values"] else {0: "batch", 1: "length"}
    dynamic = tuple({dim: torch.export.Dim(name) for dim, name in dims.items()} for _ in names)
    with torch.no_grad(), _quiet():
        outputs = list(named_outputs(model, inputs))
        program = torch.onnx.export(
            _Positional(model, names),
            tuple(inputs[name] for name in names),
            dynamo=True,
            dynamic_shapes=(dynamic,),
            input_names=names,
            output_names=outputs,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        program.save(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes about operators of packages that the model does not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
