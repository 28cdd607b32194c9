"""How sensitive the predictions of a model are to errors in the outputs of its layers.

Shapes: R outputs of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from ..calibration.batches import call_model, mask_for_inputs, to_device, token_masks
from ..distributed import Communicator, input_device
from ..model.evaluation_mode import evaluation_mode
from ..model.layers import PrunableLayer


def output_sensitivities(
    model: nn.Module, layers: Collection[PrunableLayer], batches: Sequence[Any], communicator: Communicator
) -> dict[str, float]:
    """Returns the sensitivity of the predictions to the outputs y of each layer: Σ ‖∂log p/∂y‖² / R over all tokens,
    where p is the probability that the model gives to its own prediction and R the number of outputs of the layer. Of
    a model without logits log p is half the squared norm of its outputs.

    The prediction needs no labels, and each row counts by itself, however rows are distributed over batches.

    Args:
        model: its parameters get no gradients.
        layers: those of modules that are called; no fused experts.
        batches: those of this rank.
        communicator: the ranks.

    Raises:
        ValueError: a gradient is inf or nan.
    """
    names = sorted(layer.name for layer in layers)
    if not names:
        return {}
    modules = {layer.name: model.get_submodule(layer.module) for layer in layers}
    totals, error = {name: torch.zeros((), dtype=torch.float64) for name in names}, None
    has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    with evaluation_mode(model), torch.enable_grad(), _without_gradients(model), ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(_observe_output(name, totals)))
        try:
            for batch in batches:
                masks = token_masks(batch, has_decoder)
                _log_probability(call_model(model, to_device(batch, input_device(model))), masks).backward()
        except Exception as exception:  # of any kind: the other ranks must not wait for this one
            error = exception
    communicator.raise_together(error)
    sums = torch.stack([totals[name].cpu() for name in names])
    communicator.all_reduce(sums)
    if not bool(torch.isfinite(sums).all()):
        raise ValueError(
            "gradients of the calibration data are inf or nan: run the model in bfloat16 or float32, or check it for "
            "a broken weight."
        )
    return dict(zip(names, sums.tolist(), strict=True))


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradients: those of outputs suffice."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _observe_output(name: str, totals: dict[str, torch.Tensor]) -> Callable:
    def add(gradient: torch.Tensor) -> None:
        total = gradient.float().square().sum(dtype=torch.float64) / gradient.shape[-1]
        totals[name] = totals[name].to(total.device) + total

    def observe(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # The sum is part of the graph, also where nothing before it is.
        observed = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        observed.register_hook(add)
        return observed

    return observe


def _log_probability(output: Any, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The log-probability of what the model predicts, summed over all tokens but padding."""
    named = output if isinstance(output, Mapping) else {}
    logits = [value for key, value in named.items() if key.endswith("logits") and torch.is_tensor(value)]
    if logits:
        values = [value.float().log_softmax(-1).amax(-1, keepdim=True) for value in logits]
    else:
        tensors = [leaf for leaf in _pytree.tree_leaves(output) if torch.is_tensor(leaf)]
        values = [next(tensor for tensor in tensors if tensor.is_floating_point()).float().square() / 2]
    total = values[0].new_zeros(())
    for value in values:
        keep = mask_for_inputs(masks, value)
        total = total + (value if keep is None else value[keep.to(value.device)]).sum()
    return total
