"""Tiny models that read words, with their tokenizers, and texts of those words."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


WORDS = "good bad film story the a is and very not one two three four five six seven eight".split()
BOS = 1
POSITIONS = 32


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every text begins with <s>, token 1; the words follow from token 2 on. There is no padding token."""
    vocab = {word: index for index, word in enumerate(["<unk>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(WORDS) + 2, "max_position_embeddings": POSITIONS}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def bert_tokenizer() -> BertTokenizer:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: index for index, word in enumerate(vocab)})


def classifier(**config) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(WORDS) + 5, "max_position_embeddings": POSITIONS}
    return BertForSequenceClassification(BertConfig(**sizes | config)).eval()


def texts(count: int, least: int = 3, most: int = 12) -> list[str]:
    """The same every time, of so many words each."""
    numbers = torch.Generator().manual_seed(0)
    lengths = torch.randint(least, most + 1, (count,), generator=numbers).tolist()
    return [
        " ".join(WORDS[word] for word in torch.randint(len(WORDS), (length,), generator=numbers).tolist())
        for length in lengths
    ]


def save(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
