"""Tiny models and runs that the tests share. A run takes a fraction of a second and is the same every time."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from hf_sparse import PruningConfig, SparseTrainer, SparseTrainingArguments
from hf_sparse.files import STATE_FILE


STEPS = 10
# Prune steps after the optimizer steps 3, 5, 7 and 8 of 10: there are checkpoints before, between and after them.
SCHEDULE = {"prune_start": 3, "prune_end": 8, "prune_every": 2}
PRUNE_STEPS = (3, 5, 7, 8)
TIMINGS = ("runtime", "per_second")


def bert(seed: int = 0, **config) -> BertForSequenceClassification:
    """1 layer of BERT, with dropout, and a pooler beside it: 6 weights, 4,224 in all, are selected by default."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 16}
    return BertForSequenceClassification(BertConfig(**sizes | config))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Weights of Conv1D, (inputs, outputs), and tied embeddings."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))


def samples(count: int = 24, language: bool = False) -> list[dict]:
    """Random tokens; the label says whether the first is in the upper half of the vocabulary."""
    tokens = torch.randint(2, 40, (count, 8), generator=torch.Generator().manual_seed(1))
    return [
        {
            "input_ids": row.tolist(),
            "attention_mask": [1] * 8,
            "labels": row.tolist() if language else int(row[0] >= 20),
        }
        for row in tokens
    ]


def arguments(output_dir: Path, cls=None, **options) -> TrainingArguments:
    """Arguments of a short, quiet run: `TrainingArguments` where nothing of pruning is said."""
    cls = cls or (SparseTrainingArguments if options.keys() & set(PruningConfig.options()) else TrainingArguments)
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(output_dir=str(output_dir), **defaults | options)


def make(
    output_dir: Path,
    trainer: type[Trainer] = SparseTrainer,
    model=None,
    callbacks=None,
    trainer_options=None,
    **options,
):
    """A trainer of a tiny model on tiny data, ready to train."""
    trainer_options = trainer_options or {}
    model = None if "model_init" in trainer_options else model or bert()
    data = samples(language=isinstance(model, GPT2LMHeadModel))
    given = {"train_dataset": data, "eval_dataset": data[:8], "callbacks": callbacks, **trainer_options}
    return trainer(model, arguments(output_dir, **options), **given)


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def zeros(model) -> int:
    """Among the weights of linear layers; the embedding of the padding token is zero from the start."""
    selected = (weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embeddings" not in name)
    return sum(int((weight == 0).sum()) for weight in selected)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two dicts of tensors are equal, bit for bit."""
    return left.keys() == right.keys() and all(bits_equal(left[name], right[name]) for name in left)


def bits_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))


def figures(log_history: list[dict]) -> list[dict]:
    """What was logged, less timings."""
    return [{key: value for key, value in log.items() if not key.endswith(TIMINGS)} for log in log_history]


def content(checkpoint: Path) -> dict:
    """Everything in a checkpoint that a run goes on from, to be compared with ==."""
    checkpoint = Path(checkpoint)
    tensors = {
        f"{name}/{key}": tensor
        for name in ("model.safetensors", STATE_FILE)
        for key, tensor in load_file(checkpoint / name).items()
    }
    _flatten(torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"), "optimizer", tensors)
    _flatten(torch.load(checkpoint / "scheduler.pt", weights_only=True, map_location="cpu"), "scheduler", tensors)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found = {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if torch.is_tensor(value) else value
        for name, value in tensors.items()
    }
    return found | {"log": figures(state["log_history"]), "step": state["global_step"]}


def _flatten(value, name: str, into: dict) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{name}/{key}", into)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _flatten(item, f"{name}/{index}", into)
    else:
        into[name] = value.reshape(1) if torch.is_tensor(value) and not value.ndim else value
