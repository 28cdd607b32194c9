"""A tiny model of every kind that can be evaluated, with padded batches and their labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

from helpers.architectures import ARCHITECTURES
from helpers.tiny_texts import WORDS, classifier, llama


ROWS, TOKENS = 6, 9


def bert(cls: str, **config) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, cls)(classifier(initializer_range=0.6, **config).config).eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 8, 8, 6, 5, 3])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, len(WORDS), (ROWS, TOKENS), generator=generator), "attention_mask": mask}


def integers(limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, limit, (ROWS, *shape), generator=torch.Generator().manual_seed(4))


def masked(labels: torch.Tensor) -> torch.Tensor:
    """Token labels with -100 at padding and in the first column."""
    labels = labels.masked_fill(inputs()["attention_mask"] == 0, -100)
    labels[:, 0] = -100
    return labels


def spans() -> dict[str, torch.Tensor]:
    return {"start_positions": integers(2) + 1, "end_positions": integers(3) + 2}


Kind = tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]

KINDS: dict[str, Kind] = {
    "causal": (llama, lambda: inputs()),
    "masked": (lambda: bert("BertForMaskedLM"), lambda: inputs() | {"labels": masked(integers(20, TOKENS))}),
    "targets": (
        lambda: ARCHITECTURES["t5"].model(),
        lambda: inputs() | {"labels": masked(integers(20, TOKENS))[:, :4].contiguous()},
    ),
    "classes": (
        lambda: bert("BertForSequenceClassification", num_labels=3),
        lambda: inputs() | {"labels": integers(3)},
    ),
    "several labels": (
        lambda: bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        lambda: inputs() | {"labels": integers(2, 3).float()},
    ),
    "numbers": (
        lambda: bert("BertForSequenceClassification", num_labels=1),
        lambda: inputs() | {"labels": integers(9).float()},
    ),
    "token classes": (
        lambda: bert("BertForTokenClassification", num_labels=3),
        lambda: inputs() | {"labels": masked(integers(3, TOKENS))},
    ),
    "answers": (lambda: bert("BertForQuestionAnswering"), lambda: inputs() | spans()),
    "embeddings": (lambda: bert("BertModel"), lambda: inputs()),
    "images": (
        lambda: ARCHITECTURES["vit"].model(),
        lambda: {
            "pixel_values": torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(5)),
            "labels": integers(2),
        },
    ),
}


def batches_of(kind: str, *sizes: int) -> list[dict[str, torch.Tensor]]:
    """Returns the rows of a kind in batches of these sizes."""
    parts = {name: values.split(sizes) for name, values in KINDS[kind][1]().items()}
    return [{name: values[index] for name, values in parts.items()} for index in range(len(sizes))]


def perturb(model: nn.Module) -> nn.Module:
    """Zeros every third weight of the matrices, as pruning would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.view(-1)[::3] = 0
    return model
