"""Exports a model to OpenVINO, in the precision of the device, in 16 bits, or quantized to int8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from ..optional_packages import require
from .onnx import ONNX_FILE, to_onnx


OPENVINO_FILE = "openvino_model.xml"
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def to_openvino(
    model: PreTrainedModel,
    path: str | Path,
    dtype: str | None = None,
    calibration: Sequence[dict[str, torch.Tensor]] | None = None,
) -> None:
    """Writes a model as an OpenVINO IR: an .xml file, and a .bin file beside it.

    Args:
        model: a model of transformers in float32, in evaluation mode on the CPU.
        path: the .xml file to write.
        dtype: "fp32", "bf16" or "fp16": the precision to compute in. bf16 and fp16 also store the weights in 16 bits.
            None: weights in float32, computed in the fastest precision of the device, such as bf16 on CPUs with AMX.
        calibration: batches by input name; quantizes weights and activations to int8 (post-training quantization).

    Raises:
        ImportError: openvino, onnx, onnxscript or, to quantize, nncf is not installed.
        ValueError: the model is an encoder-decoder, or takes neither texts nor images.
    """
    require("export", "openvino", "onnx", "onnxscript", *(["nncf"] if calibration else []))
    import openvino

    with TemporaryDirectory() as folder:
        to_onnx(model, Path(folder) / ONNX_FILE)
        program = openvino.convert_model(str(Path(folder) / ONNX_FILE))
    if calibration:
        program = _quantize(program, calibration)
    if dtype:
        program.set_rt_info(PRECISIONS[dtype], ["runtime_options", "INFERENCE_PRECISION_HINT"])
    openvino.save_model(program, str(path), compress_to_fp16=dtype in ("bf16", "fp16"))


def _quantize(program: Any, calibration: Sequence[dict[str, torch.Tensor]]) -> Any:
    import nncf

    # One row at a time: its statistics need no padding.
    rows = [
        {name: tensor[row : row + 1].numpy() for name, tensor in batch.items()}
        for batch in calibration
        for row in range(len(next(iter(batch.values()))))
    ]
    return nncf.quantize(program, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
