"""Tiny students and teachers of each task, and their batches with padding."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


LENGTHS = (3, 8, 5, 6)
_TOKENS = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(1))
_BERT = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
_BERT |= {"max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert(cls, layers: int, **options):
    return cls(BertConfig(**_BERT, num_hidden_layers=layers, **options))


def _llama(layers: int):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24, num_hidden_layers=layers))


def _t5(layers: int):
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=layers, decoder_start_token_id=0))


@dataclass(frozen=True)
class Task:
    """Args:
    build: a model with a number of layers.
    labels: of a row of the given number and length.
    """

    build: Any
    labels: Any

    def model(self, seed: int = 0, layers: int = 2):
        torch.manual_seed(seed)
        return self.build(layers)

    def rows(self) -> list[dict]:
        """Four rows of different lengths."""
        return [
            {"input_ids": _TOKENS[row, :length].tolist(), **self.labels(row, length)}
            for row, length in enumerate(LENGTHS)
        ]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pads inputs with 0 and labels of tokens with -100."""
    batch = {"attention_mask": [[1] * len(row["input_ids"]) for row in rows]}
    batch |= {name: [row[name] for row in rows] for name in rows[0]}
    padded = {}
    for name, values in batch.items():
        if isinstance(values[0], list) and name != "multi":
            width, filler = max(map(len, values)), -100 if name == "labels" else 0
            values = [value + [filler] * (width - len(value)) for value in values]
        padded[name] = torch.tensor(values)
    return padded


TASKS = {
    "classification": Task(
        lambda layers: _bert(BertForSequenceClassification, layers, num_labels=3), lambda row, _: {"labels": row % 3}
    ),
    "multi_label": Task(
        lambda layers: _bert(BertForSequenceClassification, layers, num_labels=3),
        lambda row, _: {"labels": [float(row % 2), 1.0, 0.0]},
    ),
    "regression": Task(
        lambda layers: _bert(BertForSequenceClassification, layers, num_labels=1), lambda row, _: {"labels": row / 3}
    ),
    "tokens": Task(
        lambda layers: _bert(BertForTokenClassification, layers, num_labels=5),
        lambda row, length: {"labels": [-100, *((row + place) % 5 for place in range(1, length))]},
    ),
    "questions": Task(
        lambda layers: _bert(BertForQuestionAnswering, layers),
        lambda row, length: {"start_positions": row % 2, "end_positions": length - 1},
    ),
    "causal": Task(_llama, lambda row, length: {"labels": [-100, -100, *_TOKENS[row, 2:length].tolist()]}),
    "seq2seq": Task(_t5, lambda row, length: {"labels": _TOKENS[3 - row, : LENGTHS[3 - row]].tolist()}),
}
