"""Pruning with ready-made batches needs neither `datasets` nor `evaluate`; reading texts says that it does."""

import subprocess
import sys


PROGRAM = """
import sys

sys.modules["datasets"] = sys.modules["evaluate"] = None  # importing them fails from now on

import torch
from torch import nn

from hf_sparse import (
    OneshotConfig,
    Pruner,
    PruningConfig,
    SparseTrainer,
    SparseTrainingArguments,
    calibration_batches,
    evaluate_model,
    prune_oneshot,
)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
report = Pruner(nn.Linear(8, 8), PruningConfig(target_sparsity=0.5, criterion="magnitude")).update(1, 1)
assert report.sparsity == 0.5, report.sparsity

batches = calibration_batches([torch.randn(4, 8), torch.randn(4, 8)], None, model, length=8)
report = prune_oneshot(model, batches, OneshotConfig(target_sparsity=0.75), progress=False)
assert report.sparsity == 0.75, report.sparsity


class TinyForSequenceClassification(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_labels": 2, "problem_type": None})
        self.bias = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, x):
        return type("Output", (), {"logits": self.bias.expand(len(x), 2)})


found = evaluate_model(TinyForSequenceClassification(), [{"x": torch.ones(4), "labels": torch.tensor([0, 1, 1, 1])}])
assert found == {"accuracy": 0.75, "samples": 4}, found

try:
    calibration_batches(["a text"], type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 0}), model, length=8)
except ImportError as error:
    print(error)
"""


def test_pruning_without_datasets_and_evaluate():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reading texts needs the datasets library: run `pip install datasets`" in done.stdout
