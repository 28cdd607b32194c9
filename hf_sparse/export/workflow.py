"""Exports a checkpoint to a folder for another runtime, and measures that it still computes the same."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..calibration.text_tables import find_text_columns, load_texts
from ..files import check_writable, write_folder_atomically
from ..hub.loading import load_model, load_tokenizer
from ..hub.sources import check_model
from .agreement import Agreement, measure_agreement
from .inputs import input_names, random_inputs, text_inputs
from .onnx import ONNX_FILE, to_onnx
from .openvino import OPENVINO_FILE, PRECISIONS, to_openvino
from .runtimes import open_exported, torch_runtime


TARGETS = ("onnx", "openvino")
_TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# What is not the model itself, so that the folder can be used with the model's tokenizer or image processor.
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHT_INDEX = "*.index.json"
_SAMPLES = 100


def export_model(
    model: str,
    output_dir: str | Path,
    to: str,
    dtype: str | None = None,
    int8: bool = False,
    calibration_file: str | None = None,
    text_column: str | None = None,
    samples: int = _SAMPLES,
    length: int = 128,
) -> Agreement:
    """Exports a checkpoint to ONNX or OpenVINO, with its config and tokenizer.

    Args:
        model: folder or Hub name.
        output_dir: folder to write; replaced if it exists.
        to: "onnx" or "openvino".
        dtype: "fp32", "bf16" or "fp16", see `to_openvino`; for ONNX the data type of weights and computation.
        int8: quantize weights and activations to int8 (OpenVINO), with ranges measured on the calibration texts.
        calibration_file: texts, to quantize and to compare with; None compares on random tokens.
        text_column: the column of the texts; None finds it.
        samples: number of texts.
        length: largest number of tokens of a text.

    Returns:
        How well the outputs agree with those of the checkpoint in torch and float32.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
        OSError: there is no such model or file.
        ValueError: an option is not valid, or the model cannot be exported.
    """
    _check_options(to, dtype, int8, calibration_file)
    if calibration_file is None and (text_column is not None or samples != _SAMPLES):
        name = "samples" if text_column is None else "text_column"
        raise ValueError(f"`{name}` has no effect without `calibration_file`: give that too, or leave `{name}` out.")
    check_writable(Path(output_dir).absolute().parent, f"`output_dir` {output_dir}")
    check_model(model)
    texts = None
    if calibration_file is not None:
        table = load_texts(calibration_file)
        (column, *_) = find_text_columns(table, text_column)
        texts = table[:samples][column]
    source = load_model(model, "float32")
    takes_images = input_names(source) == ["pixel_values"]
    batches = [random_inputs(source, 4, min(length, 32), seed) for seed in range(4)]
    if texts is not None:
        if takes_images:
            raise ValueError("`calibration_file` has texts, but the model takes images: leave it out.")
        batches = text_inputs(texts, load_tokenizer(model), length)

    def write(folder: Path) -> None:
        if Path(model).is_dir():
            _copy_side_files(Path(model), folder)
        if to == "openvino":
            to_openvino(source, folder / OPENVINO_FILE, dtype, batches if int8 else None)
        else:
            to_onnx(load_model(model, _TORCH_DTYPES[dtype]) if dtype else source, folder / ONNX_FILE)

    write_folder_atomically(output_dir, write)
    return measure_agreement(open_exported(output_dir), torch_runtime(source), batches)


def _check_options(to: str, dtype: str | None, int8: bool, calibration_file: str | None) -> None:
    if to not in TARGETS:
        raise ValueError(f'`to` is "{to}": it must be {" or ".join(TARGETS)}.')
    if dtype is not None and dtype not in PRECISIONS:
        raise ValueError(f'`dtype` is "{dtype}": it must be one of {", ".join(PRECISIONS)}.')
    if int8 and to != "openvino":
        raise ValueError(f'`int8` cannot be combined with `to="{to}"`: use `to="openvino"`.')
    if int8 and calibration_file is None:
        raise ValueError("`int8` needs `calibration_file`: about 100 texts like those that the model will read.")
    if int8 and dtype is not None:
        raise ValueError(f'`int8` and `dtype="{dtype}"` exclude each other: leave one of them out.')
    if to == "onnx" and dtype == "bf16":
        raise ValueError('ONNX Runtime does not compute in bf16 on CPUs: use `to="openvino"`, or `dtype="fp16"`.')


def _copy_side_files(source: Path, folder: Path) -> None:
    for pattern in _SIDE_FILES:
        for file in source.glob(pattern):
            if not file.match(_WEIGHT_INDEX) and not file.name.startswith("pruning_"):
                shutil.copy2(file, folder)
