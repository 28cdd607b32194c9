"""Which fields of a config set the sizes of a model: one table from model type to fields.

A size without a field cannot change in a plain model. The heads of BERT are one: their size is hidden_size /
num_attention_heads, so that fewer heads would be wider, not fewer rows. `tests/structured` proves every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..model.coupling import UnitGroup


@dataclass(frozen=True)
class StackFields:
    """The config fields of one stack of blocks. None where the config has no field that changes the size alone.

    Args:
        part: component of module names that tells the stack from the others: "encoder", "decoder", or "" for a model
            with one stack.
        neurons: width of the FFNs.
        expert_neurons: width of the FFNs of experts; None if it is that of all FFNs.
        heads: number of query heads.
        kv_heads: number of key-value heads.
        head_dim: size of a head; it is written out, since its default would change with the number of heads.
        layers: number of blocks.
        experts: number of experts.
        per_layer: lists with one entry for each block.
        layer_numbers: lists of numbers of blocks.
        layer_step: a number n: all blocks but every n-th one belong to `layer_numbers` too.
        pre_norm: whether a block whose weights are zero is the identity, or the config field that says so. After a
            norm on the residual stream (post-norm, as in BERT) it is not.
    """

    part: str = ""
    neurons: str | None = "intermediate_size"
    expert_neurons: str | None = None
    heads: str | None = None
    kv_heads: str | None = None
    head_dim: str | None = None
    layers: str | None = "num_hidden_layers"
    experts: str | None = None
    per_layer: tuple[str, ...] = ()
    layer_numbers: tuple[str, ...] = ()
    layer_step: str | None = None
    pre_norm: bool | str = True

    def size_of(self, group: UnitGroup) -> str:
        """Returns the field for the number of units in a group of neurons or heads."""
        in_expert = any(part.expert is not None for part in group.slices)
        field = self.heads if group.kind == "head" else self.expert_neurons if in_expert else self.neurons
        return f"{field or self.neurons}"


def _both_parts(encoder: StackFields, **decoder: str) -> tuple[StackFields, StackFields]:
    """Returns the fields of an encoder and of a decoder with some other fields."""
    return encoder, replace(encoder, part="decoder", **decoder)  # type: ignore[arg-type]


_POST_NORM = StackFields(pre_norm=False)
_DECODER = StackFields(
    heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim", per_layer=("layer_types",)
)
_BART = StackFields("encoder", neurons="encoder_ffn_dim", layers="encoder_layers", pre_norm=False)
_PRE_NORM_BART = replace(_BART, pre_norm=True)
_T5 = StackFields("encoder", neurons="d_ff", heads="num_heads", head_dim="d_kv", layers="num_layers")

CONFIG_FIELDS: dict[str, tuple[StackFields, ...]] = {
    "bart": _both_parts(_BART, neurons="decoder_ffn_dim", layers="decoder_layers"),
    "bert": (_POST_NORM,),
    "deberta-v2": (_POST_NORM,),
    "distilbert": (replace(_POST_NORM, neurons="hidden_dim", layers="n_layers"),),
    "electra": (_POST_NORM,),
    "gemma": (_DECODER,),
    "gemma2": (_DECODER,),
    "gemma3_text": (_DECODER,),
    "gpt2": (StackFields(neurons="n_inner", layers="n_layer"),),
    "granite": (_DECODER,),
    "llama": (_DECODER,),
    "mbart": _both_parts(_PRE_NORM_BART, neurons="decoder_ffn_dim", layers="decoder_layers"),
    "mistral": (_DECODER,),
    "mixtral": (replace(_DECODER, experts="num_local_experts"),),
    "modernbert": (StackFields(per_layer=("layer_types",)),),
    "mt5": _both_parts(_T5, layers="num_decoder_layers"),
    "opt": (StackFields(neurons="ffn_dim", pre_norm="do_layer_norm_before"),),
    "phi3": (_DECODER,),
    "qwen2": (_DECODER,),
    "qwen3": (_DECODER,),
    "qwen3_moe": (
        replace(
            _DECODER,
            expert_neurons="moe_intermediate_size",
            experts="num_experts",
            layer_numbers=("mlp_only_layers",),
            layer_step="decoder_sparse_step",
        ),
    ),
    "roberta": (_POST_NORM,),
    "smollm3": (replace(_DECODER, per_layer=("layer_types", "no_rope_layers")),),
    "t5": _both_parts(_T5, layers="num_decoder_layers"),
    "vit": (StackFields(heads="num_attention_heads", head_dim="head_dim"),),
    "whisper": _both_parts(_PRE_NORM_BART, neurons="decoder_ffn_dim", layers="decoder_layers"),
    "xlm-roberta": (_POST_NORM,),
}
"""Model type -> the fields of each of its stacks."""


@dataclass(frozen=True)
class Stack:
    """The config section and the fields of the blocks around a module.

    Args:
        model_type: of the section.
        path: attributes that lead from the model's config to the section: () for the config itself, ("text_config",)
            for the language model of a model of images and text.
        fields: of the stack.
        is_listed: whether the model type is in the table. For others the fields have the most common names.
    """

    model_type: str
    path: tuple[str, ...]
    fields: StackFields
    is_listed: bool = True

    def section(self, config: Any) -> Any:
        """Returns the section of the model's config."""
        for attribute in self.path:
            config = getattr(config, attribute)
        return config

    def is_pre_norm(self, config: Any) -> bool:
        """Returns whether a block of zeros is the identity."""
        value = self.fields.pre_norm
        return bool(getattr(self.section(config), value, True)) if isinstance(value, str) else value


def find_stack(model: nn.Module, name: str) -> Stack | None:
    """Returns the stack around the module `name`; None if no config belongs to it alone.

    Args:
        model: a model of transformers.
        name: of a module in it.
    """
    section = _section_around(model, name)
    if section is None:
        return None
    path, model_type = section
    parts = name.split(".")
    if model_type not in CONFIG_FIELDS:
        return Stack(model_type, path, _DECODER, is_listed=False)
    for fields in CONFIG_FIELDS[model_type]:
        if not fields.part or fields.part in parts:
            return Stack(model_type, path, fields)
    return None


def _section_around(model: nn.Module, name: str) -> tuple[tuple[str, ...], str] | None:
    """Returns the path and model type of the config section of the innermost module around `name` that has one."""
    sections = list(_sections(getattr(model, "config", None)))
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        module: Any = model
        for part in parts[:length]:
            module = getattr(module, part, None)
        config = getattr(module, "config", None)
        if not isinstance(model_type := getattr(config, "model_type", None), str):
            continue
        same = [path for path, section in sections if section is config]
        # The encoder of T5 has a copy of the config.
        same = same or [path for path, section in sections if section.model_type == model_type]
        if len(same) == 1:
            return same[0], model_type
    return None


def _sections(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields a config and the configs in it, with their paths."""
    if isinstance(getattr(config, "model_type", None), str):
        yield path, config
        for name, value in vars(config).items():
            if not name.startswith("_"):
                yield from _sections(value, (*path, name))


def table_obstacle(model: nn.Module, group: UnitGroup) -> str | None:
    """Returns why units of a group cannot be removed, by what `CONFIG_FIELDS` says of the model type, and the remedy.

    Returns: None if the table names no obstacle, also for model types that it does not have.
    """
    stack = find_stack(model, group.name)
    if stack is None:
        return f"no config of {type(model).__name__} belongs to {group.name} alone."
    if group.kind == "layer" and not stack.is_listed:
        return (
            f'whether a block of zeros is the identity is not known for "{stack.model_type}" models. Choose the '
            "blocks to keep with `layers` of hf_sparse.shrink."
        )
    if group.kind == "layer" and not stack.is_pre_norm(getattr(model, "config", None)):
        return (
            f'a "{stack.model_type}" model has norms on its residual stream (post-norm), so a block of zeros is not '
            "the identity and must stay. Choose the blocks to keep with `layers` of hf_sparse.shrink and fine-tune "
            "the result, or prune neurons."
        )
    if group.kind == "head" and stack.fields.heads is None:
        return (
            f'the config of a "{stack.model_type}" model has no field for fewer heads of the same size, so heads can '
            "be zero but not removed. Prune neurons to a quarter instead: about the same speed and quality."
        )
    return None
