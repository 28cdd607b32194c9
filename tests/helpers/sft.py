"""TRL's SFTTrainer on a tiny Llama, for tests of other libraries' trainers and of adapters."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tiny import arguments


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(35))]


class SFT:
    """TRL's SFTTrainer on a Llama of one layer."""

    body = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    body += [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    prefix = ""
    reopen = AutoModelForCausalLM.from_pretrained

    def __init__(self):
        trl = pytest.importorskip("trl")
        self.trainer, self.arguments = trl.SFTTrainer, trl.SFTConfig

    def model(self, seed=0):
        torch.manual_seed(seed)
        sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
        return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3))

    def make(self, folder, callbacks, trainer=None, model=None, trainer_options=None, **options):
        words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
        )
        texts = [{"text": " ".join(f"w{(7 * row + column) % 35}" for column in range(6))} for row in range(24)]
        args = arguments(folder, cls=self.arguments, max_length=16, **options)
        return (trainer or self.trainer)(
            model or self.model(),
            args,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            callbacks=callbacks,
            **trainer_options or {},
        )
