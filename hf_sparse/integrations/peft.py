"""Merging the adapters of a PEFT model into a pruned base without losing the zeros of the base.

The base W is sparse, the update U of an adapter is dense, so W + U would be dense. With the mask M of the base (False
where W is zero) the merged weight is W + M * U. The part of U that is left out changes the outputs of the model, so it
is measured and reported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine.masks import MaskStore
from ..model.layers import find_layers, plain_name
from ..registry import nearest
from .merge_report import MergedLayer, MergeReport


if TYPE_CHECKING:
    from peft import PeftMixedModel, PeftModel


logger = logging.getLogger(__name__)


def merge_and_unload(
    model: PeftModel | PeftMixedModel,
    masks: Mapping[str, torch.Tensor] | None = None,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> tuple[nn.Module, MergeReport]:
    """PEFT's `merge_and_unload`, except that zero weights of the base stay zero.

    W <- W + M * U for every prunable weight W that has an adapter, where U is the update that PEFT merges (LoRA, DoRA,
    several adapters at once) and M is False where W is zero, or as given by `masks`. Embeddings and biases are merged
    as PEFT merges them, and modules that were trained as copies (`modules_to_save`) replace the originals.

    The merged model computes something else than the base with its adapters: the part of the updates that was left out
    is logged and returned for each layer. Evaluate the merged model.

    Args:
        model: the model with adapters.
        masks: parameter name -> bool mask of the parameter's shape, True is kept, such as the masks of a `Pruner`. A
            weight in it is masked by this mask instead of its zeros, so that a kept weight that happens to be zero
            can change. The names are those with or without PEFT's prefixes.
        safe_merge: refuse updates that are not finite, as in PEFT. Layers that were merged before are then unmerged,
            see `merged_adapter`.
        adapter_names: the adapters to merge; None for the active ones.

    Returns: the base model without adapters, and the report.

    Raises:
        ImportError: peft is not installed.
        TypeError: `model` is not a PeftModel.
        ValueError: there is no adapter of that name or none that changes weights, adapters are merged already, the
            adapter replicates layers, the base is quantized, the masks do not belong to the weights, or an update is
            not finite (`safe_merge`).
        NotImplementedError: the base is sharded or offloaded, or the adapter is on an `nn.MultiheadAttention`.

    Example:
        >>> model, report = merge_and_unload(peft_model)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        >>> model.save_pretrained("merged")  # doctest: +SKIP
    """
    with merged_adapter(model, masks, safe_merge, adapter_names) as report:
        with _ignore_merged_warnings():
            # All updates are merged already: PEFT only removes the adapter layers.
            names = _validate_adapter_names(model, adapter_names)
            merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=names)
    return merged, report


@contextmanager
def merged_adapter(
    model: PeftModel | PeftMixedModel,
    masks: Mapping[str, torch.Tensor] | None = None,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[MergeReport]:
    """Context manager that merges the adapters in place as `merge_and_unload` does, and unmerges them on exit.

    On exit PEFT subtracts the updates: kept weights are restored up to the rounding of W + U - U, and zeros are +0.0.
    Do not call PEFT's `unmerge_adapter` inside: it would subtract the updates from the zeros as well, where they were
    not added.

    Args and errors are those of `merge_and_unload`. Yields: the report.

    Example:
        >>> with merged_adapter(peft_model) as report:  # doctest: +SKIP
        ...     trainer.evaluate()
    """
    merge = _MaskedMerge(model, masks, adapter_names)
    try:
        with _ignore_merged_warnings():
            report = merge.run(safe_merge)
            # Merges what has no mask: embeddings and biases.
            model.merge_adapter(safe_merge=safe_merge, adapter_names=merge.adapter_names)
        if report.masked:
            logger.warning(
                "%s entries of the adapters' updates were left out to keep the zeros of the base: %.1f%% of the norm "
                "of the updates. The merged model differs from the base with adapters: evaluate it.",
                f"{report.masked:,}",
                100 * report.norm_lost,
            )
        yield report
    finally:
        with _ignore_merged_warnings():
            model.unmerge_adapter()
        for module in merge.modules:
            module.masks.enforce(module.weights)


@dataclass(frozen=True)
class _AdaptedModule:
    """An outermost adapter layer and those inside it, and the prunable weights that they are merged into, by name."""

    adapter_layers: list[Any]
    weights: dict[str, nn.Parameter]
    masks: MaskStore


class _MaskedMerge:
    """The adapted modules of a model with the masks of their weights. The constructor changes nothing."""

    def __init__(
        self,
        model: PeftModel | PeftMixedModel,
        masks: Mapping[str, torch.Tensor] | None,
        adapter_names: Sequence[str] | None,
    ):
        adapter_layer_class = _validate_model(model)
        self.adapter_names = _validate_adapter_names(model, adapter_names)
        outermost: list[list[Any]] = []
        visited: set[int] = set()
        for module in model.modules():
            if isinstance(module, adapter_layer_class) and id(module) not in visited:
                outermost.append([layer for layer in module.modules() if isinstance(layer, adapter_layer_class)])
                visited |= {id(layer) for layer in outermost[-1]}
        _validate_adapters(model, outermost)
        masks = _masks_by_plain_name(model, masks)
        prunable = {layer.name for layer in find_layers(model)}
        names = {id(weight): name for name, weight in model.named_parameters() if name in prunable}
        self.modules = []
        for adapter_layers in outermost:
            parameters = adapter_layers[0].parameters()
            weights = {names[id(weight)]: weight for weight in parameters if id(weight) in names}
            if weights:
                _validate_weights(weights)
                self.modules.append(_AdaptedModule(adapter_layers, weights, _build_masks(weights, masks)))

    @torch.no_grad()
    def run(self, safe_merge: bool) -> MergeReport:
        """Merges and masks one module after the other, so that only one module's weights are copied at a time."""
        merged = []
        for module in self.modules:
            before = {name: weight.detach().clone() for name, weight in module.weights.items()}
            for layer in module.adapter_layers:
                layer.merge(safe_merge=safe_merge, adapter_names=self.adapter_names)
            for name, weight in module.weights.items():
                merged.append(_measure_update(name, weight.detach() - before[name], module.masks))
            module.masks.enforce(module.weights)
        return MergeReport(tuple(merged))


def _build_masks(weights: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> MaskStore:
    """Returns the given masks, and for weights without one the mask of their zeros."""
    store = MaskStore({name: (weight.shape, weight.device) for name, weight in weights.items()})
    for name, parameter in weights.items():
        weight = parameter.detach()
        store.replace(name, masks.get(plain_name(name), weight != 0))
        nonzero = int(torch.count_nonzero(weight[store.bits(name) == 0]))
        if nonzero:
            raise ValueError(
                f'masks: {nonzero:,} of the pruned weights of "{name}" are not zero, so the masks belong to other '
                "weights. Give those of this base, or none to keep its zeros."
            )
    return store


def _measure_update(name: str, update: torch.Tensor, masks: MaskStore) -> MergedLayer:
    masked_update = update[masks.bits(name) == 0]
    return MergedLayer(
        name=plain_name(name),
        weights=update.numel(),
        zeros=masked_update.numel(),
        masked=int(torch.count_nonzero(masked_update)),
        update_norm=float(torch.linalg.vector_norm(update, dtype=torch.float32)),
        masked_norm=float(torch.linalg.vector_norm(masked_update, dtype=torch.float32)),
    )


def _validate_model(model: object) -> type:
    """Checks that `model` has PEFT adapters, and returns the base class of PEFT's adapter layers."""
    try:
        from peft import PeftMixedModel, PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("merging adapters needs peft, which is not installed: pip install peft.") from error
    if not isinstance(model, (PeftModel, PeftMixedModel)):
        raise TypeError(
            f"`model` is a {type(model).__name__}, but must be a PeftModel, as returned by get_peft_model or "
            "PeftModel.from_pretrained."
        )
    return BaseTunerLayer


def _validate_adapter_names(
    model: PeftModel | PeftMixedModel, adapter_names: Sequence[str] | None
) -> list[str] | None:
    """Checks the names, because PEFT ignores unknown ones, and returns them as a list."""
    if adapter_names is None:
        return None
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    adapters = sorted(model.peft_config)
    if not names or not set(names) <= set(adapters):
        raise ValueError(
            f"`adapter_names={names}`: the model has the adapters {', '.join(adapters)}. Name one of these."
        )
    return names


def _masks_by_plain_name(
    model: PeftModel | PeftMixedModel, masks: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Returns the masks under the parameter names without PEFT's prefixes."""
    parameters = [plain_name(name) for name, _ in model.named_parameters()]
    by_plain_name = {plain_name(name): mask for name, mask in (masks or {}).items()}
    unknown = sorted(by_plain_name.keys() - set(parameters))
    if unknown:
        raise ValueError(f'masks: "{unknown[0]}" is not a parameter of the model.{nearest(unknown[0], parameters)}')
    return by_plain_name


def _validate_adapters(model: PeftModel | PeftMixedModel, outermost: Sequence[Sequence[Any]]) -> None:
    """Checks that the adapters change weights, are not merged yet, and can be merged."""
    configs = model.peft_config.values()
    if not outermost:
        types = sorted({str(config.peft_type).rpartition(".")[2] for config in configs})
        raise ValueError(
            f"the adapter ({', '.join(types)}) changes no weights, so there is nothing to merge: use it with the "
            "base, whose zeros it does not change."
        )
    merged = sorted({name for layers in outermost for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"{', '.join(merged)}: already merged, without keeping the zeros of the base. Call "
            "model.unmerge_adapter() first."
        )
    if any(isinstance(layers[0].get_base_layer(), nn.MultiheadAttention) for layers in outermost):
        raise NotImplementedError(
            "an adapter is on a MultiheadAttention, whose weights PEFT replaces when it merges, so their zeros cannot "
            "be kept: leave that module out of the adapter's target_modules."
        )
    _validate_not_quantized(model)
    if any(getattr(config, "layer_replication", None) for config in configs):
        raise ValueError("the adapter replicates layers of the base (layer_replication), which PEFT cannot merge.")


def _validate_not_quantized(model: PeftModel | PeftMixedModel) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    method = getattr(base, "quantization_method", None)
    quantized = [
        f"{name} is {parameter.dtype}"
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() or parameter.element_size() == 1
    ]
    if method or getattr(base, "is_quantized", False) or quantized:
        reason = quantized[0] if quantized else method or "is_quantized"
        raise ValueError(
            f"the base is quantized ({reason}), and merging does not keep the zeros of quantized weights: load the "
            "base in float32, bfloat16 or float16, put the adapter on it, and merge that."
        )


def _validate_weights(weights: Mapping[str, nn.Parameter]) -> None:
    """Checks that every weight is a full, plain tensor of this process."""
    for name, weight in weights.items():
        if type(weight.data) is not torch.Tensor or weight.is_meta or not weight.numel():
            kind = "meta" if weight.is_meta else type(weight.data).__name__
            raise NotImplementedError(
                f'"{name}" ({kind}, shape {tuple(weight.shape)}) is sharded or offloaded, but merging needs the full '
                "weight: load the model unsharded in one process and merge there."
            )


@contextmanager
def _ignore_merged_warnings() -> Iterator[None]:
    """Suppresses PEFT's warnings that layers are merged or unmerged already, as they are by design here."""
    with warnings.catch_warnings():
        for message in ("All adapters are already merged", "Already following adapters", "Already unmerged"):
            warnings.filterwarnings("ignore", message=message)
        yield
