"""Runtimes: a model as a function from inputs to its first output, in torch, ONNX Runtime or OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..optional_packages import has_packages, require
from .onnx import ONNX_FILE, named_outputs
from .openvino import OPENVINO_FILE


Runtime = Callable[[dict[str, torch.Tensor]], torch.Tensor]

PACKAGES = {
    "torch": (),
    "compile": (),
    "generate": (),
    "onnx": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}
"""Name of a runtime -> the packages that it needs besides torch."""
NEW_TOKENS = 32
"""Tokens that the runtime "generate" adds to each text."""


def installed_runtimes() -> list[str]:
    """Returns the names of the runtimes of one forward whose packages are installed."""
    return [name for name, packages in PACKAGES.items() if has_packages(*packages) and name != "generate"]


def torch_runtime(model: PreTrainedModel, compiled: bool = False) -> Runtime:
    """Returns a model as a function that runs without gradients, on the model's device.

    Args:
        model: a model of transformers.
        compiled: whether to use `torch.compile`.
    """
    forward: Any = torch.compile(model) if compiled else model
    device = next(model.parameters()).device

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            moved = {
                name: tensor.to(device, model.dtype if tensor.is_floating_point() else None)
                for name, tensor in inputs.items()
            }
            output = next(iter(named_outputs(forward, moved).values()))
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        return output

    return run


def generation_runtime(model: PreTrainedModel) -> Runtime:
    """Returns greedy generation by a causal language model as a function: `NEW_TOKENS` tokens after each text.

    Raises:
        ValueError: the model cannot generate, or, when called, its positions do not suffice.
    """
    generator: Any = model
    if not model.can_generate():
        raise ValueError(f'{type(model).__name__} cannot generate text: leave "generate" out of `runtime`.')

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        length = moved["input_ids"].shape[1] + NEW_TOKENS
        if length > getattr(model.config, "max_position_embeddings", length):
            raise ValueError(
                f"{length - NEW_TOKENS} tokens and {NEW_TOKENS} new ones are more than the model's "
                f"{model.config.max_position_embeddings} positions: choose a smaller `length`."
            )
        return generator.generate(
            **moved, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        ).cpu()

    return run


def onnx_runtime(path: str | Path, threads: int | None = None) -> Runtime:
    """Opens an ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: the file.
        threads: number of threads; None for all cores.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    require("export", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0].name
    is_half = {value.name: value.type == "tensor(float16)" for value in session.get_inputs()}

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        (values,) = session.run(
            [output], {name: (tensor.half() if is_half[name] else tensor).numpy() for name, tensor in inputs.items()}
        )
        return torch.from_numpy(values)

    return run


def openvino_runtime(path: str | Path, threads: int | None = None) -> Runtime:
    """Opens an OpenVINO IR on the CPU, optimized for latency.

    Args:
        path: the .xml file.
        threads: number of threads; None for all cores.

    Raises:
        ImportError: openvino is not installed.
    """
    require("export", "openvino")
    import openvino

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    program = core.read_model(str(path))
    if program.has_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]):
        options["INFERENCE_PRECISION_HINT"] = program.get_rt_info(
            ["runtime_options", "INFERENCE_PRECISION_HINT"]
        ).astype(str)
    compiled = core.compile_model(program, "CPU", options)
    request = compiled.create_infer_request()

    def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        results = request.infer({name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(next(iter(results.values())))

    return run


def exported_runtime(folder: str | Path) -> str | None:
    """Returns the name of the runtime of the model that `export_model` wrote to a folder; None if there is none."""
    files = {"openvino": OPENVINO_FILE, "onnx": ONNX_FILE}
    return next((name for name, file in files.items() if (Path(folder) / file).is_file()), None)


def open_exported(folder: str | Path, threads: int | None = None) -> Runtime:
    """Opens the model that `export_model` wrote to a folder.

    Raises:
        FileNotFoundError: the folder holds none.
        ImportError: its runtime is not installed.
    """
    name, folder = exported_runtime(folder), Path(folder)
    if name is None:
        raise FileNotFoundError(f'"{folder}" has neither {OPENVINO_FILE} nor {ONNX_FILE}: write it with `export`.')
    return (
        openvino_runtime(folder / OPENVINO_FILE, threads)
        if name == "openvino"
        else onnx_runtime(folder / ONNX_FILE, threads)
    )
