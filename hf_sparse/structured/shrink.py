"""Removes the zero units of a model: a smaller plain model of the same class."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .block_removal import LayersToKeep, remove_blocks
from .build import SmallerModel, check_model
from .expert_removal import ExpertsToKeep, remove_experts
from .plan import ShrinkPlan
from .reduction import Reduction, ShrinkError
from .unit_removal import remove_units
from .verify import verify_shrunk


Model = TypeVar("Model", bound=nn.Module)


def plan_shrink(
    model: nn.Module,
    layers: LayersToKeep | None = None,
    experts: ExpertsToKeep | None = None,
    multiple_of: int = 8,
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
    return _plan(*_reduce(model, layers, experts, multiple_of))


def shrink(
    model: Model,
    layers: LayersToKeep | None = None,
    experts: ExpertsToKeep | None = None,
    multiple_of: int = 8,
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
        verify: whether to compare both models on a small random batch.

    Raises:
        ShrinkError: `model` is no model of transformers or is split over devices; `layers` or `experts` is not valid;
            or the outputs of both models differ by more than 1e-4 relatively (float32).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> model = BertModel(BertConfig(vocab_size=9, **sizes))
        >>> _ = model.encoder.layer[0].output.dense.weight.data[:, 3:].zero_()
        >>> shrink(model).encoder.layer[0].intermediate.dense
        Linear(in_features=8, out_features=8, bias=True)
    """
    reduction, smaller = _reduce(model, layers, experts, multiple_of)
    shrunk = smaller.assign()
    if verify:
        verify_shrunk(model, shrunk, reduction)
    return shrunk  # type: ignore[return-value]


def _reduce(
    model: nn.Module, layers: LayersToKeep | None, experts: ExpertsToKeep | None, multiple_of: int
) -> tuple[Reduction, SmallerModel]:
    if multiple_of < 1:
        raise ShrinkError(f"multiple_of is {multiple_of}: it must be at least 1.")
    check_model(model)
    reduction = Reduction(model)
    remove_blocks(reduction, layers)
    remove_experts(reduction, experts)
    remove_units(reduction, "neuron", multiple_of)
    remove_units(reduction, "head", multiple_of)
    return reduction, SmallerModel(reduction)


def _plan(reduction: Reduction, smaller: SmallerModel) -> ShrinkPlan:
    parameters, num_bytes = smaller.count()
    return ShrinkPlan(
        type(reduction.model).__name__,
        tuple(reduction.changes),
        tuple(reduction.reasons),
        dict(reduction.blocks),
        parameters,
        num_bytes,
    )
