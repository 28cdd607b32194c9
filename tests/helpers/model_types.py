"""A tiny model of each type whose config fields `hf_sparse.structured` knows, with random weights, biases and norms.

Every model has 3 blocks in each stack, FFNs of 24 neurons, and 4 heads of size 8, in 2 groups where the type has
grouped queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.vit import modeling_vit


# Older versions of transformers have a module for the encoder, and derive the size of heads from their number.
IS_OLD_VIT = hasattr(modeling_vit, "ViTEncoder")
BASE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
ENCODER_DECODER = {
    "vocab_size": 48, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, 48, (rows, tokens), generator=torch.Generator().manual_seed(3))


def text() -> dict[str, torch.Tensor]:
    """Two texts, the second of which is padded on the left."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def pairs() -> dict[str, torch.Tensor]:
    return text() | {"decoder_input_ids": ids(tokens=5)}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


def audio() -> dict[str, torch.Tensor]:
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "decoder_input_ids": ids(tokens=5)}


@dataclass(frozen=True)
class ModelType:
    """How to make a tiny model of a type.

    Args:
        model, config: classes of transformers.
        options: of the config.
        kinds: units that its config can express, written down by hand from what plain `from_pretrained` opens.
        inputs: makes a batch.
        auto: the Auto class that opens it.
        stacks: names of its lists of blocks.
        generates: whether it has `generate`.
    """

    model: str
    config: str
    options: dict[str, Any]
    kinds: tuple[str, ...]
    inputs: Callable[[], dict[str, torch.Tensor]] = text
    auto: str = "AutoModelForCausalLM"
    stacks: tuple[str, ...] = ("model.layers",)
    generates: bool = True

    def make(self, seed: int = 0, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options | options))
        with torch.no_grad():
            for parameter in model.parameters():
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
                parameter.copy_(torch.randn(parameter.shape) * scale + (parameter.ndim == 1) * 0.5)
        return model.eval()


ALL, WITHOUT_HEADS = ("neuron", "head", "layer"), ("neuron", "layer")
T5 = {
    "vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
PAIRS_OF_T5 = (ALL, pairs, "AutoModelForSeq2SeqLM", ("encoder.block", "decoder.block"))
BART = ENCODER_DECODER | {"max_position_embeddings": 40}
PAIRS_OF_BART = (pairs, "AutoModelForSeq2SeqLM", ("model.encoder.layers", "model.decoder.layers"))
BERT_LIKE = {"kinds": ("neuron",), "auto": "AutoModelForSequenceClassification", "generates": False}
MODEL_TYPES = {
    "bert": ModelType(
        "BertForSequenceClassification", "BertConfig", BASE, stacks=("bert.encoder.layer",), **BERT_LIKE
    ),
    "roberta": ModelType(
        "RobertaForSequenceClassification", "RobertaConfig", BASE, stacks=("roberta.encoder.layer",), **BERT_LIKE
    ),
    "xlm-roberta": ModelType(
        "XLMRobertaForSequenceClassification", "XLMRobertaConfig", BASE, stacks=("roberta.encoder.layer",), **BERT_LIKE
    ),
    "electra": ModelType(
        "ElectraForSequenceClassification", "ElectraConfig", BASE, stacks=("electra.encoder.layer",), **BERT_LIKE
    ),
    "distilbert": ModelType(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 48, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 40},
        stacks=("distilbert.transformer.layer",),
        **BERT_LIKE,
    ),
    "modernbert": ModelType(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        BASE
        | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        WITHOUT_HEADS,
        auto="AutoModelForMaskedLM",
        generates=False,
    ),  # fmt: skip
    "deberta-v2": ModelType(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        BASE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
        stacks=("deberta.encoder.layer",),
        **BERT_LIKE,
    ),
    "vit": ModelType(
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
        | {"image_size": 8, "patch_size": 4},
        WITHOUT_HEADS if IS_OLD_VIT else ALL,
        images,
        "AutoModelForImageClassification",
        ("vit.encoder.layer" if IS_OLD_VIT else "vit.layers",),
        generates=False,
    ),
    "gpt2": ModelType(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 24, "n_positions": 40}
        | {"bos_token_id": 1, "eos_token_id": 2},
        WITHOUT_HEADS,
        stacks=("transformer.h",),
    ),
    "opt": ModelType(
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 24}
        | {"max_position_embeddings": 40, "word_embed_proj_dim": 32, "pad_token_id": 0},
        WITHOUT_HEADS,
        stacks=("model.decoder.layers",),
    ),
    "llama": ModelType("LlamaForCausalLM", "LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True}, ALL),
    "qwen2": ModelType(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        GROUPED | SLIDING | {"use_sliding_window": True, "tie_word_embeddings": True},
        ALL,
    ),
    "qwen3": ModelType("Qwen3ForCausalLM", "Qwen3Config", GROUPED | SLIDING | {"use_sliding_window": True}, ALL),
    "mistral": ModelType("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 4}, ALL),
    "granite": ModelType("GraniteForCausalLM", "GraniteConfig", GROUPED, ALL),
    "smollm3": ModelType("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED | {"no_rope_layers": [1, 1, 0]}, ALL),
    "gemma": ModelType("GemmaForCausalLM", "GemmaConfig", GROUPED, ALL),
    "gemma2": ModelType("Gemma2ForCausalLM", "Gemma2Config", GROUPED | SLIDING, ALL),
    "gemma3_text": ModelType("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | SLIDING, ALL),
    "phi3": ModelType("Phi3ForCausalLM", "Phi3Config", BASE | {"num_key_value_heads": 2}, ALL),
    "mixtral": ModelType(
        "MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, ALL
    ),
    "qwen3_moe": ModelType(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
        ALL,
    ),  # fmt: skip
    "t5": ModelType("T5ForConditionalGeneration", "T5Config", T5, *PAIRS_OF_T5),
    "mt5": ModelType("MT5ForConditionalGeneration", "MT5Config", T5, *PAIRS_OF_T5),
    "bart": ModelType("BartForConditionalGeneration", "BartConfig", BART, ("neuron",), *PAIRS_OF_BART),
    "mbart": ModelType("MBartForConditionalGeneration", "MBartConfig", BART, WITHOUT_HEADS, *PAIRS_OF_BART),
    "whisper": ModelType(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        ENCODER_DECODER
        | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        WITHOUT_HEADS,
        audio,
        "AutoModelForSpeechSeq2Seq",
        ("model.encoder.layers", "model.decoder.layers"),
    ),  # fmt: skip
}
