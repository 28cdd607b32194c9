"""What the tensors of a checkpoint are, told by their names and shapes, for there is no model to ask.

These are guesses, and named so in what is printed. A report of hf_sparse beside the weights knows better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..model.layers import PrunableLayer, select_layers
from .checkpoint import Checkpoint, StoredTensor


# Parts of names that embeddings and task heads of Hugging Face models have.
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
_ROUTERS = ("gate", "router")
_HEADS = ("cls", "head", "heads", "score", "qa_outputs", "vocab_projector", "vocab_transform")


def layouts(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[str, ...]]:
    """Name -> the layouts that the tensor may have (kinds of `PrunableLayer`); () for what is no weight of a layer.

    GPT-2's Conv1D, (I, O), is told from Linear, (O, I), by the biases, which have O entries: where a weight of that
    name is not square, they say it, and all weights of that name in the checkpoint are taken to be the same.
    """
    leaves = set(_conv1d_leaves(tensors))
    return {name: _layouts(tensor, leaves) for name, tensor in tensors.items()}


def _layouts(tensor: StoredTensor, conv1d_leaves: set[str]) -> tuple[str, ...]:
    if len(tensor.shape) == 2:
        return ("conv1d" if _leaf(tensor.name) in conv1d_leaves else "linear",)
    if len(tensor.shape) == 3 and "experts" in tensor.name:
        return "experts", "experts_transposed"
    return ("conv2d",) if len(tensor.shape) in (3, 4) and tensor.name.endswith("weight") else ()


def _conv1d_leaves(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for tensor in tensors.values():
        bias = tensors.get(f"{tensor.name.removesuffix('.weight')}.bias")
        if bias is not None and len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]:
            if bias.shape == (tensor.shape[1],):
                yield _leaf(tensor.name)


def _leaf(name: str) -> str:
    """The name of the module that holds a parameter, without what leads to it."""
    return name.rpartition(".")[0].rpartition(".")[2]


@dataclass(frozen=True)
class Selection:
    """The weights that pruning selects.

    Args:
        known_by: "report" (`pruning_report.json` names them), "config" (`pruning_config.json` chooses among those that
            look prunable) or "guess" (all that look prunable in the body).
        names: of the tensors.
        renamed: those among them that the report has by other names: the model's, which are not always the files'.
    """

    known_by: str
    names: frozenset[str]
    renamed: frozenset[str] = frozenset()


def selection(checkpoint: Checkpoint) -> Selection:
    """Which tensors are the weights that pruning selects, and how that is known."""
    layers = _layers(checkpoint)
    guess = frozenset(layer.name for layer in layers if layer.in_body)
    if checkpoint.report is not None:
        reported = {layer.name: layer.weights for layer in checkpoint.report.layers}
        named = frozenset(reported.keys() & checkpoint.tensors.keys())
        missing = sum(weights for name, weights in reported.items() if name not in named)
        # transformers renames and splits weights of some models as it saves them: then they agree in sum.
        if missing and missing == sum(checkpoint.tensors[name].numel for name in guess - named):
            return Selection("report", guess | named, guess - named)
        return Selection("report", named) if named else Selection("guess", guess)
    if not checkpoint.pruning_config:
        return Selection("guess", guess)
    options, chosen = checkpoint.pruning_config, set()
    for group in (options.get("groups") or {"weights": {}}).values():
        own = options | group
        chosen.update(select_layers(layers, own.get("targets"), own.get("exclude"))[0])
    return Selection("config", frozenset(layer.name for layer in chosen))


def _layers(checkpoint: Checkpoint) -> list[PrunableLayer]:
    kinds = layouts(checkpoint.tensors)
    vocabulary = _vocabulary(checkpoint.config)
    return [
        PrunableLayer(tensor.name, kinds[tensor.name][0], tensor.shape, _in_body(tensor, vocabulary))
        for tensor in checkpoint.tensors.values()
        if _looks_prunable(tensor) and kinds[tensor.name]
    ]


def _looks_prunable(tensor: StoredTensor) -> bool:
    """Floats in 2 or 4 dimensions called weight, or fused experts in 3, that are no embedding or router, as far as
    names tell, nor of an adapter."""
    name = tensor.name.lower()
    fused = len(tensor.shape) == 3 and "experts" in name and "bias" not in name
    other = set(name.split(".")) & set(_EMBEDDINGS) or _leaf(name) in _ROUTERS
    named = fused or (len(tensor.shape) in (2, 4) and name.endswith("weight"))
    return named and tensor.is_float and "lora_" not in name and not other


def _in_body(tensor: StoredTensor, vocabulary: set[int]) -> bool:
    parts = tensor.name.lower().split(".")
    is_head = any(part in _HEADS or part.endswith("_head") or "classifier" in part for part in parts)
    return not is_head and not any("embed" in part for part in parts) and tensor.shape[0] not in vocabulary


def _vocabulary(config: Mapping[str, Any]) -> set[int]:
    """The sizes of the vocabularies that a model's config names, also in the configs inside it, less those that
    another size of the model equals."""
    others = {value for name, value in config.items() if isinstance(value, int) and name != "vocab_size"}
    inner = (_vocabulary(value) for value in config.values() if isinstance(value, dict))
    return ({config.get("vocab_size")} - others - {None}).union(*inner)


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Names that the files leave out -> the tensor that they share memory with: what the files' metadata say, and
    the output embeddings of a language model whose config ties them."""
    tied = dict(checkpoint.shared)
    languages = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
    talks = any(name.endswith(languages) for name in checkpoint.config.get("architectures") or ())
    inputs = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight")
    embeddings = [name for name in checkpoint.tensors if name.endswith(inputs)]
    separate = any(part in name for name in checkpoint.tensors for part in ("lm_head.weight", "decoder.weight"))
    if checkpoint.config.get("tie_word_embeddings") is True and talks and embeddings and not separate:
        tied["output embeddings"] = embeddings[0]
    return tied
