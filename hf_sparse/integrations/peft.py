"""Merging the adapters of a PEFT model into a pruned base, whose zeros stay.

The base holds zeros, the update of an adapter is dense. Added together they would be dense again, so the update is
left out where the base is zero: with the base W, its mask M (False where W is zero) and the update U that PEFT merges,
W <- W + M * U. What is left out changes what the model computes, so it is counted and told.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..engine.masks import MaskStore
from ..model.layers import find_layers, plain_name
from ..registry import nearest
from ..reporting.tables import format_table


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedLayer:
    """One weight of the base: `zeros` of its `weights` were held, and `masked` entries of the update, other than zero,
    were left out there. `update` is the Frobenius norm of the whole update, `left_out` that of what was left out."""

    name: str
    weights: int
    zeros: int
    masked: int
    update: float
    left_out: float

    @property
    def lost(self) -> float:
        """The share of the update's norm that was left out."""
        return self.left_out / self.update if self.update else 0.0


@dataclass(frozen=True)
class MergeReport:
    """What merging left out, so that the zeros of the base stay.

    Args:
        layers: the weights that were merged into.

    Example:
        >>> layer = MergedLayer("query.weight", weights=16, zeros=8, masked=8, update=5.0, left_out=3.0)
        >>> MergeReport((layer,)).lost
        0.6
        >>> print(MergeReport((layer,)))
        layer         zeros  weights  masked  norm lost
        query.weight      8       16       8      60.0%
        all               8       16       8      60.0%
    """

    layers: tuple[MergedLayer, ...]

    @property
    def total(self) -> MergedLayer:
        """All layers, taken together."""
        counts = (sum(getattr(layer, field) for layer in self.layers) for field in ("weights", "zeros", "masked"))
        norms = (sum(getattr(layer, field) ** 2 for layer in self.layers) ** 0.5 for field in ("update", "left_out"))
        return MergedLayer("all", *counts, *norms)

    @property
    def masked(self) -> int:
        """How many entries of the updates were left out."""
        return self.total.masked

    @property
    def lost(self) -> float:
        """The share of the updates' norm, over all layers, that was left out."""
        return self.total.lost

    def __str__(self) -> str:
        rows = [("layer", "zeros", "weights", "masked", "norm lost")]
        for layer in (*self.layers, self.total):
            rows.append(
                (layer.name, f"{layer.zeros:,}", f"{layer.weights:,}", f"{layer.masked:,}", f"{layer.lost:.1%}")
            )
        return format_table(rows, text_columns=1)


def merge_and_unload(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | None = None,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> tuple[nn.Module, MergeReport]:
    """PEFT's `merge_and_unload`, with every weight of the base that is exactly zero left at exactly +0.0.

    W <- W + M * U for every prunable weight W that has an adapter: U is the update that PEFT itself merges (LoRA,
    DoRA, several adapters at once), M is False where W is zero, or where `masks` say so. Embeddings and biases are
    merged as PEFT merges them, and modules that were trained as copies (`modules_to_save`) are taken as trained.

    The merged model is not the model with adapters beside a base with zeros: what was left out is logged, and
    returned, layer by layer. Evaluate the merged model.

    Args:
        model: a PeftModel.
        masks: parameter name -> bool mask, True is kept, such as a `Pruner`'s: they take the place of a weight's own
            zeros, so that a kept weight that is zero by chance may still change. Names may be those with or without
            PEFT; weights that are not named go by their zeros.
        safe_merge: as in PEFT, refuse updates that are not finite. What was merged before is then taken back, see
            `merged_adapter`.
        adapter_names: which adapters; left out, the active ones.

    Returns: the base model without adapters, and the report.

    Raises:
        ImportError: peft is not installed.
        TypeError: `model` is not a PeftModel.
        ValueError: no adapter that changes weights, or none of that name, adapters merged before, replicated layers,
            a quantized base, masks of other weights, or an update that is not finite (`safe_merge`).
        NotImplementedError: the base is sharded or offloaded, or the adapter is on an `nn.MultiheadAttention`.

    Example:
        >>> model, report = merge_and_unload(peft_model)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        >>> model.save_pretrained("merged")  # doctest: +SKIP
    """
    with merged_adapter(model, masks, safe_merge, adapter_names) as report:
        with _merged_before_is_no_news():
            # Nothing is left to merge for PEFT, which takes its layers out.
            merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=_check_names(model, adapter_names))
    return merged, report


@contextmanager
def merged_adapter(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | None = None,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[MergeReport]:
    """The adapters merged for a while, in place, with the zeros of the base held; see `merge_and_unload`.

    On leaving, PEFT takes its update back: kept weights return as far as PEFT returns them, up to the rounding of
    W + U - U, and the zeros are +0.0. Do not call PEFT's `unmerge_adapter` inside: it takes the update away from the
    zeros too, where it was never added.

    Yields: the report.

    Raises: as `merge_and_unload`.

    Example:
        >>> with merged_adapter(peft_model) as report:  # doctest: +SKIP
        ...     trainer.evaluate()
    """
    plan = _Plan(model, masks, adapter_names)
    try:
        with _merged_before_is_no_news():
            report = plan.merge(safe_merge)
            model.merge_adapter(safe_merge=safe_merge, adapter_names=plan.adapter_names)
        if report.masked:
            logger.warning(
                "%s entries of the adapters' updates fell on zeros of the base and were left out: %.1f%% of the "
                "updates' norm. The merged model differs from the one with adapters; evaluate it.",
                f"{report.masked:,}",
                100 * report.lost,
            )
        yield report
    finally:
        with _merged_before_is_no_news():
            model.unmerge_adapter()
        plan.enforce()


@dataclass(frozen=True)
class _Block:
    """A layer of adapters with those inside it, the weights that it merges into, and the masks of these."""

    layers: list[nn.Module]
    weights: dict[str, nn.Parameter]
    masks: MaskStore


class _Plan:
    """Which weights are merged into, and which of them stay zero. Making it changes nothing."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, torch.Tensor] | None,
        adapter_names: Sequence[str] | None,
    ):
        tuner_layer = _check_model(model)
        self.adapter_names = _check_names(model, adapter_names)
        modules, inside = [], set()
        for module in model.modules():  # the outermost layers of adapters; those inside are merged with them
            if isinstance(module, tuner_layer) and id(module) not in inside:
                modules.append([layer for layer in module.modules() if isinstance(layer, tuner_layer)])
                inside |= {id(layer) for layer in modules[-1]}
        _check_modules(model, modules)
        masks = _check_mask_names(model, masks)
        prunable = {layer.name for layer in find_layers(model)}
        names = {id(weight): name for name, weight in model.named_parameters() if name in prunable}
        self.blocks = []
        for layers in modules:
            weights = {names[id(weight)]: weight for weight in layers[0].parameters() if id(weight) in names}
            if weights:
                _check_whole(weights)
                self.blocks.append(_Block(layers, weights, _lock(weights, masks)))

    @torch.no_grad()
    def merge(self, safe_merge: bool) -> MergeReport:
        """Merge and mask, one block after another, so that no more than one is held twice."""
        merged = []
        for block in self.blocks:
            before = {name: weight.detach().clone() for name, weight in block.weights.items()}
            for layer in block.layers:
                layer.merge(safe_merge=safe_merge, adapter_names=self.adapter_names)
            merged += [_measure(name, block, before[name]) for name in block.weights]
            block.masks.enforce(block.weights)
        return MergeReport(tuple(merged))

    def enforce(self) -> None:
        """Write +0.0 at all places that are held."""
        for block in self.blocks:
            block.masks.enforce(block.weights)


def _lock(weights: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> MaskStore:
    """The masks given, and the zeros of the weights that those do not name."""
    store = MaskStore({name: (weight.shape, weight.device) for name, weight in weights.items()})
    for name, weight in weights.items():
        weight = weight.detach()
        store.replace(name, masks.get(plain_name(name), weight != 0))
        alive = int(torch.count_nonzero(weight[store.bits(name) == 0]))
        if alive:
            raise ValueError(
                f'masks: {alive:,} of the pruned weights of "{name}" are not zero, so the masks belong to other '
                "weights. Give those of this base, or leave them out and its zeros are held."
            )
    return store


def _measure(name: str, block: _Block, before: torch.Tensor) -> MergedLayer:
    """What the update was, and what of it falls on zeros."""
    update = block.weights[name].detach() - before
    left_out = update[block.masks.bits(name) == 0]
    return MergedLayer(
        name=plain_name(name),
        weights=update.numel(),
        zeros=left_out.numel(),
        masked=int(torch.count_nonzero(left_out)),
        update=float(torch.linalg.vector_norm(update, dtype=torch.float32)),
        left_out=float(torch.linalg.vector_norm(left_out, dtype=torch.float32)),
    )


def _check_model(model: nn.Module) -> type:
    """See that it is PEFT's; returns the class of PEFT's layers."""
    try:
        from peft import PeftMixedModel, PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("merging adapters needs peft, which is not installed: pip install peft.") from error
    if not isinstance(model, (PeftModel, PeftMixedModel)):
        raise TypeError(
            f"model is a {type(model).__name__}; adapters are merged from a PeftModel, as get_peft_model or "
            "PeftModel.from_pretrained return it."
        )
    return BaseTunerLayer


def _check_names(model: nn.Module, adapter_names: Sequence[str] | None) -> list[str] | None:
    """The names as a list. PEFT passes over names that it does not know."""
    if adapter_names is None:
        return None
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    known = sorted(model.peft_config)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"adapter_names={names}: the model has the adapters {', '.join(known)}. Name one of these.")
    return names


def _check_mask_names(model: nn.Module, masks: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The masks by the names that their weights have without PEFT."""
    known = [plain_name(name) for name, _ in model.named_parameters()]
    given = {plain_name(name): mask for name, mask in (masks or {}).items()}
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise ValueError(f'masks: "{unknown[0]}" is no parameter of the model.{nearest(unknown[0], known)}')
    return given


def _check_modules(model: nn.Module, modules: Sequence[Sequence[nn.Module]]) -> None:
    """See that there is something to merge, that none of it is merged yet, and that the base holds numbers."""
    if not modules:
        kinds = sorted({str(config.peft_type).rpartition(".")[2] for config in model.peft_config.values()})
        raise ValueError(
            f"the adapter ({', '.join(kinds)}) changes no weights, so there is nothing to merge: it stays beside the "
            "base, whose zeros it does not touch."
        )
    merged = sorted({name for layers in modules for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"{', '.join(merged)}: merged already, over the zeros of the base. Call model.unmerge_adapter() first."
        )
    if any(isinstance(layers[0].get_base_layer(), nn.MultiheadAttention) for layers in modules):
        raise NotImplementedError(
            "an adapter is on a MultiheadAttention, whose weights PEFT replaces when it merges, so no zeros can be "
            "held there: leave that module out of the adapter's target_modules."
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    method = getattr(base, "quantization_method", None)
    quantized = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.is_floating_point() or parameter.element_size() == 1
    ]
    if method or getattr(base, "is_quantized", False) or quantized:
        which = f"{quantized[0]} is {dict(model.named_parameters())[quantized[0]].dtype}" if quantized else method
        raise ValueError(
            f"the base is quantized ({which or 'is_quantized'}), and a quantized zero is not kept by merging: load "
            "the base in float32, bfloat16 or float16, put the adapter on it, and merge that."
        )
    if any(getattr(config, "layer_replication", None) for config in model.peft_config.values()):
        raise ValueError("the adapter replicates layers of the base (layer_replication), which PEFT cannot merge.")


def _check_whole(weights: Mapping[str, nn.Parameter]) -> None:
    """See that this process holds the values: as a plain tensor that is not empty."""
    for name, weight in weights.items():
        if type(weight.data) is not torch.Tensor or weight.is_meta or not weight.numel():
            kind = "meta" if weight.is_meta else type(weight.data).__name__
            raise NotImplementedError(
                f'"{name}" ({kind}, shape {tuple(weight.shape)}) is not whole here: it is sharded or offloaded. Load '
                "the model whole, in one process, and merge there."
            )


@contextmanager
def _merged_before_is_no_news() -> Iterator[None]:
    """PEFT warns of layers that were merged before, which is how they are merged here."""
    with warnings.catch_warnings():
        for message in ("All adapters are already merged", "Already following adapters", "Already unmerged"):
            warnings.filterwarnings("ignore", message=message)
        yield
