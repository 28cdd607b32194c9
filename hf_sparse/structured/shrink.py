"""Removes the zero units of a model: a smaller plain model of the same class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..model.coupling import UnitGroup
from .block_removal import LayersToKeep, remove_blocks
from .build import SmallerModel, check_model, smaller_name
from .expert_removal import ExpertsToKeep, remove_experts
from .plan import ShrinkPlan
from .reduction import Reduction, ShrinkError
from .uneven import (
    QUANT_METHOD,
    SIZES_VERSION,
    describe_sizes,
    remove_units_by_layer,
    set_head_counts,
    set_layer_sizes,
)
from .unit_removal import remove_units
from .verify import verify_shrunk


Model = TypeVar("Model", bound=nn.Module)


def plan_shrink(
    model: nn.Module,
    layers: LayersToKeep | None = None,
    experts: ExpertsToKeep | None = None,
    multiple_of: int = 8,
    heterogeneous: bool = False,
) -> ShrinkPlan:
    """Returns what `shrink` with the same arguments would remove, what would stay and why, and the new size.

    Raises:
        ShrinkError: as `shrink`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> model = BertModel(BertConfig(vocab_size=9, **sizes))
        >>> _ = model.encoder.layer[0].output.dense.weight.data[:, 3:].zero_()
        >>> for change in plan_shrink(model).changes:
        ...     print(change)
        intermediate_size 16 -> 8: 13 of 16 neurons are zero in 1 module
    """
    reduction, smaller, _ = _reduce(model, layers, experts, multiple_of, heterogeneous)
    return _plan(reduction, smaller)


def shrink(
    model: Model,
    layers: LayersToKeep | None = None,
    experts: ExpertsToKeep | None = None,
    multiple_of: int = 8,
    heterogeneous: bool = False,
    verify: bool = True,
) -> Model:
    """Returns a smaller model of the same class, without the units of `model` that are zero. `model` stays unchanged.

    Removed are FFN neurons and attention heads (with grouped queries, key-value heads with their query heads) whose
    columns in the matrix that reads them are zero, or that are always zero themselves, and, in pre-norm models, blocks
    that add nothing to the residual stream. The outputs stay the same. Saved with `save_pretrained` or `save_shrunk`,
    the result opens with plain `from_pretrained`. The config has one width for all layers, so the layer that uses most
    units decides; `plan_shrink` says what stays.

    Args:
        model: a model of transformers with zeros, pruned by this package or not.
        layers: numbers of the blocks to keep, in increasing order. The others are removed even if they are not zero.
            For encoder-decoder models a mapping, {"encoder": [0, 2], "decoder": [0]}. None removes only zero blocks.
        experts: numbers of the experts to keep in every block, or a mapping from the number of each block to them.
            The others are removed: the model computes as if the router never chose them.
        multiple_of: FFN widths that change become multiples of it, rounded up. Widths of fused experts are also
            multiples of 16 bytes.
        heterogeneous: whether every layer may have a size of its own, and all zero units are removed, also those that
            the config cannot express, such as heads of BERT, where that makes the model smaller. A saved model then
            opens only after `import hf_sparse`; without it, `from_pretrained` fails with an error.
        verify: whether to compare both models on a small random batch.

    Raises:
        ShrinkError: `model` is not a model of transformers or is split over devices; `layers` or `experts` is not
            valid; or the outputs of both models differ by more than 1e-4 relatively (float32).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> model = BertModel(BertConfig(vocab_size=9, **sizes))
        >>> _ = model.encoder.layer[0].output.dense.weight.data[:, 3:].zero_()
        >>> shrink(model).encoder.layer[0].intermediate.dense
        Linear(in_features=8, out_features=8, bias=True)
    """
    reduction, smaller, sizes = _reduce(model, layers, experts, multiple_of, heterogeneous)
    shrunk = smaller.assign()
    if sizes:
        _set_sizes(shrunk, sizes, reduction)
    if verify:
        verify_shrunk(model, shrunk, reduction)
    return shrunk  # type: ignore[return-value]


def _reduce(
    model: nn.Module,
    layers: LayersToKeep | None,
    experts: ExpertsToKeep | None,
    multiple_of: int,
    heterogeneous: bool,
) -> tuple[Reduction, SmallerModel, dict[str, tuple[UnitGroup, int]]]:
    if multiple_of < 1:
        raise ShrinkError(f"`multiple_of` is {multiple_of}: it must be at least 1.")
    check_model(model)
    reduction = Reduction(model)
    remove_blocks(reduction, layers)
    remove_experts(reduction, experts)
    sizes: dict[str, tuple[UnitGroup, int]] = {}
    for kind in ("neuron", "head"):
        if heterogeneous:
            sizes |= remove_units_by_layer(reduction, kind, multiple_of)
        else:
            remove_units(reduction, kind, multiple_of)
    reduction.is_uneven = bool(sizes)
    smaller = SmallerModel(reduction)
    if sizes:
        plain = _reduce(model, layers, experts, multiple_of, heterogeneous=False)
        if plain[1].count() == smaller.count():  # All layers have one size, which the config can express.
            return plain
    return reduction, smaller, sizes


def _set_sizes(shrunk: nn.Module, sizes: dict[str, tuple[UnitGroup, int]], reduction: Reduction) -> None:
    """Sets the sizes that modules hold as attributes, and writes to the config how they differ from it."""
    set_layer_sizes(shrunk)
    renamed = {}
    for name, (group, kept) in sizes.items():
        slices = [
            replace(part, name=new)
            for part in group.slices
            if (new := smaller_name(part.name, reduction.blocks)) is not None
        ]
        renamed[name] = replace(group, slices=tuple(slices)), kept
    set_head_counts(shrunk, {name: size for name, size in renamed.items() if size[0].kind == "head"})
    transformer: Any = shrunk
    transformer.config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "version": SIZES_VERSION,
        **describe_sizes(shrunk),
    }


def _plan(reduction: Reduction, smaller: SmallerModel) -> ShrinkPlan:
    parameters, num_bytes = smaller.count()
    return ShrinkPlan(
        type(reduction.model).__name__,
        tuple(reduction.changes),
        tuple(reduction.reasons),
        dict(reduction.blocks),
        parameters,
        num_bytes,
        reduction.is_uneven,
    )
