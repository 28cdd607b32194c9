"""Tiny models of many families, with what a reference needs to know of each: the order of its blocks by name, how its
experts compute, and which of its inputs are padded. Nothing here is found out by the code under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.nn.functional import silu
from transformers.models.vit import modeling_vit


SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
GROUPED = SIZES | {"num_key_value_heads": 1}
TOKENS = 10


@dataclass(frozen=True)
class Architecture:
    """How to make a model, and its parts in the order in which they are to be pruned.

    Args:
        cls, config: names in transformers, and options.
        blocks: prefixes of names: what they name is pruned together, in this order. All else comes last.
        first: what comes before the blocks.
        exclude: what is not pruned.
        data: which batches, see `batches`.
        experts: (inputs of an Experts module, module) -> for each of its two weights, what reaches each expert.
    """

    cls: str
    config: str
    options: dict
    blocks: tuple[str, ...]
    first: str = "before the blocks"
    exclude: tuple[str, ...] | None = None
    data: str = "ids"
    experts: Callable | None = None

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.cls)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:  # far from the tiny, even numbers of an initialization
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        return model.eval()

    def batches(self, count: int = 5, rows: int = 3) -> list[dict]:
        return batches(self.data, count, rows)


def batches(kind: str, count: int, rows: int) -> list[dict]:
    """Batches of random data: token ids; the same with padding on the right or left; source and target; images."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(3, 48, (rows, TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, TOKENS - (index + row) % 5 :] = 0
        if kind == "left":
            mask = mask.flip(1)
        labels = torch.randint(3, 48, (rows, 7), generator=generator)
        labels[0, 5:] = -100
        images = torch.randn(rows, 3, 8, 8, generator=generator)
        made.append(
            {
                "ids": {"input_ids": ids},
                "right": {"input_ids": ids, "attention_mask": mask},
                "left": {"input_ids": ids, "attention_mask": mask},
                "pairs": {"input_ids": ids, "attention_mask": mask, "labels": labels},
                "images": {"pixel_values": images},
            }[kind]
        )
    return made


def tokens_that_count(name: str, x: torch.Tensor, batch: dict) -> torch.Tensor:
    """(T, I) the inputs of a weight that are no padding."""
    mask = batch.get("attention_mask")
    if "labels" in batch and not name.startswith(("encoder.", "model.encoder.")):
        if not any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v")):
            if not any(part in name for part in ("encoder_attn.k_proj", "encoder_attn.v_proj")):
                mask = (batch["labels"] != -100).long()
    tokens = x.reshape(-1, x.shape[-1])  # OPT drops the dimension of rows on the way
    return tokens if mask is None or len(tokens) != mask.numel() else tokens[mask.bool().reshape(-1)]


def routed(compute: Callable) -> Callable:
    """Experts that get all tokens and the numbers of those that each token goes to."""

    def inputs(args, module):
        hidden, indices = args[0], args[1]
        for expert in range(module.num_experts):
            x = hidden[(indices == expert).any(-1)]
            yield x, compute(x, module, expert)

    return inputs


def gated(x, module, expert):
    gate, up = (x @ module.gate_up_proj[expert].t()).chunk(2, -1)
    return silu(gate) * up


def gpt_oss(x, module, expert):
    both = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def llama4(args, module):
    for expert, x in enumerate(args[0].chunk(module.num_experts)):
        gate, up = (x @ module.gate_up_proj[expert]).chunk(2, -1)
        yield x, up * silu(gate)


MOE = {"num_experts_per_tok": 2}
# Older versions of transformers have a module for the encoder.
VIT = "vit.encoder.layer" if hasattr(modeling_vit, "ViTEncoder") else "vit.layers"
DECODER = ("model.layers.0.", "model.layers.1.")
ARCHITECTURES = {
    "bert": Architecture(
        "BertForSequenceClassification",
        "BertConfig",
        SIZES,
        ("bert.encoder.layer.0.", "bert.encoder.layer.1."),
        data="right",
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        ("transformer.h.0.", "transformer.h.1."),
    ),
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED, DECODER, data="left"),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        GROUPED | MOE | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
        DECODER,
        experts=routed(gated),
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
        ("encoder.block.0.", "encoder.block.1.", "decoder.block.0.", "decoder.block.1."),
        data="pairs",
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
        | {"max_position_embeddings": 32, "word_embed_proj_dim": 8},
        ("model.decoder.layers.0.", "model.decoder.layers.1."),
        first="model.decoder.project_in",
        data="right",
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | MOE | {"num_local_experts": 4},
        DECODER,
        experts=routed(gated),
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        GROUPED | MOE | {"num_local_experts": 4, "head_dim": 8},
        DECODER,
        experts=routed(gpt_oss),
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        GROUPED | {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 24},
        DECODER,
        experts=llama4,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        DECODER,
        data="left",
    ),
    "bart": Architecture(
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 48, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
        | {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 1}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        tuple(f"model.{part}.layers.{number}." for part in ("encoder", "decoder") for number in (0, 1)),
        data="pairs",
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        | {"image_size": 8, "patch_size": 4},
        (f"{VIT}.0.", f"{VIT}.1."),
        data="images",
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        ("backbone.layers.0.", "backbone.layers.1."),
        exclude=("*dt_proj",),
    ),
}
