"""Compares a shrunk model with the model that it was made from, on a small random batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..calibration.batches import call_model
from ..model.evaluation_mode import evaluation_mode
from .reduction import Reduction, ShrinkError


logger = logging.getLogger(__name__)

# Largest difference of outputs, relative to the largest output. Sums in another order differ by rounding.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_NUM_TOKENS = 16
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "image_token_id")


def verify_shrunk(model: nn.Module, shrunk: nn.Module, reduction: Reduction) -> None:
    """Raises a ShrinkError if the outputs differ. Logs a warning if no inputs can be made for the model.

    Blocks and experts that the caller named are left out of the dense model meanwhile.
    """
    name, batch = type(model).__name__, random_batch(model)
    if batch is None:
        kind = getattr(model, "main_input_name", "it")
        logger.warning("The shrunk %s was not compared with the dense model: it needs %s as input.", name, kind)
        return
    with torch.no_grad():
        try:
            with evaluation_mode(model), _without(reduction):
                expected = _float_outputs(call_model(model, batch))
        except Exception as error:  # of any kind: what a model requires beside its main input is not known
            logger.warning("The shrunk %s was not compared with the dense model, which failed: %s", name, error)
            return
        with evaluation_mode(shrunk):
            found = _float_outputs(call_model(shrunk, batch))
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    if len(expected) != len(found):
        raise ShrinkError(f"the shrunk {name} gives {len(found)} outputs instead of {len(expected)}.")
    for left, right in zip(expected, found, strict=True):
        if left.shape != right.shape:
            raise ShrinkError(f"an output of the shrunk model is {tuple(right.shape)} instead of {tuple(left.shape)}.")
        difference = float((left - right).abs().max() / left.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise ShrinkError(
                f"the outputs of the shrunk {name} differ from those of the dense model by "
                f"{difference:.1e} of the largest output, more than {tolerance:.0e} for {dtype}: units of this model "
                "are coupled in a way that is not known. Do not use the result; prune this model without shrinking it."
            )


def random_batch(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Returns a small random batch, the same every time, on the model's device; None for unknown kinds of inputs."""
    transformer: Any = model
    config, kind = transformer.config, getattr(model, "main_input_name", "")
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    make: dict[str, Callable[[], dict[str, torch.Tensor] | None]] = {
        "input_ids": lambda: {"input_ids": _random_tokens(config, generator)},
        "pixel_values": lambda: _random_image(config, generator),
        "input_features": lambda: _random_audio(config, generator),
    }
    batch = make[kind]() if kind in make else None
    if batch is None:
        return None
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = _random_tokens(config, generator)
    return {
        name: tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
    }


def _random_tokens(config: Any, generator: torch.Generator) -> torch.Tensor:
    """Returns token ids (1, T) without special tokens but for an end of text, which some task heads look for."""
    text = config.get_text_config()
    special = {getattr(text, name, None) for name in _SPECIAL_TOKENS}
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special])
    positions = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
    # The first positions are those of padding in RoBERTa.
    length = max(2, min([_NUM_TOKENS, *(number - 2 for number in positions if isinstance(number, int) and number)]))
    tokens = ordinary[torch.randint(len(ordinary), (1, length), generator=generator)]
    if isinstance(getattr(text, "eos_token_id", None), int) and text.eos_token_id < text.vocab_size:
        tokens[0, -1] = text.eos_token_id
    return tokens


def _random_image(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor] | None:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(1, channels, height, width, generator=generator)}


def _random_audio(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor] | None:
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if not isinstance(bins, int) or not isinstance(positions, int):
        return None
    return {"input_features": torch.randn(1, bins, 2 * positions, generator=generator)}


def _float_outputs(outputs: Any) -> list[torch.Tensor]:
    """Returns the floating-point outputs of a model in float64, without those of every block, head or expert."""
    named = dict(outputs) if hasattr(outputs, "items") else dict(enumerate(outputs))
    tensors = [value for name, value in named.items() if torch.is_tensor(value) and "router" not in f"{name}"]
    return [tensor.double() for tensor in tensors if tensor.is_floating_point()]


@contextmanager
def _without(reduction: Reduction) -> Iterator[None]:
    """Context manager in which the dense model computes without the blocks and experts that the caller removes."""
    with ExitStack() as stack:
        for block in reduction.named_blocks:
            module = reduction.model.get_submodule(block)
            stack.callback(module.register_forward_hook(_return_input, with_kwargs=True).remove)
        if reduction.experts:
            stack.enter_context(_WithoutExperts(reduction))
        yield


def _return_input(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook that makes a block the identity. The other outputs of the block are passed on."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class _WithoutExperts(TorchFunctionMode):
    """Sets the router's logits of removed experts to -inf."""

    def __init__(self, reduction: Reduction):
        super().__init__()
        self._removed: dict[int, torch.Tensor] = {}
        for name, parameter in reduction.model.named_parameters():
            around = next((module for module in reduction.experts if name.startswith(f"{module}.")), None)
            if around is not None and parameter.ndim == 2:
                kept = torch.zeros(parameter.shape[0], dtype=torch.bool)
                if len(kept) > max(reduction.experts[around]):
                    kept[list(reduction.experts[around])] = True
                    self._removed[id(parameter)] = ~kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and id(args[1]) in self._removed:
            return result.masked_fill(self._removed[id(args[1])].to(result.device), float("-inf"))
        return result
