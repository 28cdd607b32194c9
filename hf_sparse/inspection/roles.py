"""The role of each tensor in a checkpoint: layer kind, selected for pruning or not, tied to another.

There is no model to ask, so these are guesses from names and shapes, and output calls them guesses. The report and the
config that a pruning run saves beside the weights replace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..model.layers import BODY, DEFAULT_TARGETS, PrunableLayer, mark_blocks, select_layers
from .checkpoint import Checkpoint, StoredTensor


# Parts of the names that Hugging Face models give to embeddings, routers and task heads.
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
_ROUTERS = ("gate", "router")
_HEADS = ("cls", "head", "heads", "score", "qa_outputs", "vocab_projector", "vocab_transform")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight")

OUTPUT_EMBEDDINGS = "output embeddings"
"""Stands for the name of output embeddings that a checkpoint leaves out."""


def guess_kinds(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[str, ...]]:
    """Returns the kinds of `PrunableLayer` that each tensor may be; () for what is not the weight of a layer.

    A weight of GPT-2's Conv1D, (I, O), differs from a Linear's, (O, I), by its bias, which has O entries. A weight
    that is not square decides for all weights of modules of that name.
    """
    conv1d_modules = set()
    for name, tensor in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        is_rectangular = len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]
        if bias is not None and is_rectangular and bias.shape == (tensor.shape[1],):
            conv1d_modules.add(_module_name(name))
    return {name: _kinds(tensor, conv1d_modules) for name, tensor in tensors.items()}


def _kinds(tensor: StoredTensor, conv1d_modules: set[str]) -> tuple[str, ...]:
    if len(tensor.shape) == 2:
        return ("conv1d" if _module_name(tensor.name) in conv1d_modules else "linear",)
    if len(tensor.shape) == 3 and "experts" in tensor.name:
        return "experts", "experts_transposed"
    return ("conv2d",) if len(tensor.shape) in (3, 4) and tensor.name.endswith("weight") else ()


def _module_name(name: str) -> str:
    """Returns the last part of the name of the module that holds a parameter: "c_fc" for "h.0.mlp.c_fc.weight"."""
    return name.rpartition(".")[0].rpartition(".")[2]


@dataclass(frozen=True)
class Selection:
    """The weights that pruning selects.

    Args:
        selected_by: as in `CheckpointContents`.
        names: of the tensors.
        renamed: those of `names` that the report lists under other names, as transformers renames some weights when it
            saves a model.
    """

    selected_by: str
    names: frozenset[str]
    renamed: frozenset[str] = frozenset()


def select_tensors(checkpoint: Checkpoint) -> Selection:
    layers = _prunable_layers(checkpoint)
    guess = frozenset(layer.name for layer in layers if layer.in_blocks)
    if checkpoint.report is not None:
        reported = {layer.name: layer.weights for layer in checkpoint.report.layers}
        stored = frozenset(reported.keys() & checkpoint.tensors.keys())
        missing = sum(weights for name, weights in reported.items() if name not in stored)
        # transformers renames and splits weights of some models when it saves them: then their numbers agree in sum.
        if missing and missing == sum(checkpoint.tensors[name].numel for name in guess - stored):
            return Selection("report", guess | stored, guess - stored)
        return Selection("report", stored) if stored else Selection("guess", guess)
    if not checkpoint.pruning_config:
        return Selection("guess", guess)
    config = checkpoint.pruning_config
    selected: set[PrunableLayer] = set()
    for group in (config.get("groups") or {"weights": {}}).values():
        targets = group.get("targets", config.get("targets", DEFAULT_TARGETS))
        # An earlier version, whose default was the whole body, has written None.
        targets = [BODY] if targets is None else targets
        selected.update(select_layers(layers, targets, group.get("exclude", config.get("exclude")))[0])
    return Selection("config", frozenset(layer.name for layer in selected))


def _prunable_layers(checkpoint: Checkpoint) -> list[PrunableLayer]:
    kinds = guess_kinds(checkpoint.tensors)
    vocabulary_sizes = _vocabulary_sizes(checkpoint.config)
    layers = [
        PrunableLayer(tensor.name, kinds[tensor.name][0], tensor.shape, _is_in_body(tensor, vocabulary_sizes))
        for tensor in checkpoint.tensors.values()
        if kinds[tensor.name] and _is_prunable(tensor)
    ]
    return mark_blocks(layers, lambda layer: any(part.isdigit() for part in layer.name.split(".")))


def _is_prunable(tensor: StoredTensor) -> bool:
    """Whether a tensor looks like the weight of a layer (2-D, 4-D) or of fused experts (3-D), judged by its name."""
    name = tensor.name.lower()
    is_fused_experts = len(tensor.shape) == 3 and "experts" in name and "bias" not in name
    is_weight = is_fused_experts or (len(tensor.shape) in (2, 4) and name.endswith("weight"))
    is_other = not set(name.split(".")).isdisjoint(_EMBEDDINGS) or _module_name(name) in _ROUTERS or "lora_" in name
    return is_weight and tensor.is_float and not is_other


def _is_in_body(tensor: StoredTensor, vocabulary_sizes: set[int]) -> bool:
    parts = tensor.name.lower().split(".")
    is_head = any(part in _HEADS or part.endswith("_head") or "classifier" in part for part in parts)
    return not is_head and not any("embed" in part for part in parts) and tensor.shape[0] not in vocabulary_sizes


def _vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """Returns the vocabulary sizes in a model's config and the configs inside it, unless another option is equal."""
    others = {value for name, value in config.items() if isinstance(value, int) and name != "vocab_size"}
    size = config.get("vocab_size")
    sizes = {size} if isinstance(size, int) and size not in others else set()
    return sizes.union(*(_vocabulary_sizes(value) for value in config.values() if isinstance(value, dict)))


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the names that the files leave out, each with the tensor that it shares memory with.

    These are the names in the files' metadata, and `OUTPUT_EMBEDDINGS` for a language model whose config ties them.
    """
    tied = dict(checkpoint.shared)
    architectures = checkpoint.config.get("architectures") or ()
    is_language_model = any(name.endswith(_LANGUAGE_MODELS) for name in architectures)
    embeddings = [name for name in checkpoint.tensors if name.endswith(_INPUT_EMBEDDINGS)]
    has_head = any(part in name for name in checkpoint.tensors for part in ("lm_head.weight", "decoder.weight"))
    if checkpoint.config.get("tie_word_embeddings") is True and is_language_model and embeddings and not has_head:
        tied[OUTPUT_EMBEDDINGS] = embeddings[0]
    return tied
