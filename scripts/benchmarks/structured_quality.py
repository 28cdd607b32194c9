"""Quality of one-shot pruning of FFN neurons and attention heads: agreement of embeddings with the dense model.

    python scripts/benchmarks/structured_quality.py MODEL train.json dev.json

The first file calibrates, the second one is embedded by the dense and by the pruned model. A figure is Spearman's
correlation of the cosines of all pairs of texts. Texts are JSON lines with a field "sentence", or lines of a .txt
file; calibration texts of fewer words than --min_words are left out, since many lines of SST-2 are short phrases.
"bias" adds the mean of what is pruned to the bias and changes no other weight (FLAP). Beside each figure: passes of
the data through the first block, Cholesky factors of the solver, and seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from hf_sparse import OneshotConfig, prune_oneshot, register_solver
from hf_sparse.model.coupling import find_unit_groups
from hf_sparse.requires import Requires
from hf_sparse.solvers import HessianFactor, PruneRequest, Solver, lstsq


ROWS: dict[str, dict[str, float]] = {
    "neurons 25%": {"neuron": 0.25},
    "neurons 50%": {"neuron": 0.5},
    "neurons 75%": {"neuron": 0.75},
    "heads 25%": {"head": 0.25},
    "heads 50%": {"head": 0.5},
    "both 25%": {"neuron": 0.25, "head": 0.25},
    "both 50%": {"neuron": 0.5, "head": 0.5},
}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "solver": "none"},
    "fluctuation": {"criterion": "fluctuation", "solver": "none"},
    "fluctuation+bias": {"criterion": "fluctuation", "solver": "bias"},
    "default": {},
    "obs+lstsq": {"criterion": "obs"},
}


@dataclass(frozen=True)
class MeanBias(Solver):
    """Adds the mean contribution of pruned columns to the bias."""

    requires = Requires.GRAM
    solves_bias = True

    def solve_batched(
        self, requests: Sequence[PruneRequest], statistic: Any = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        solved = []
        for request in requests:
            new_RC = request.weight_RC * request.mask_RC
            if new_RC.shape[1] == len(statistic.total):
                new_RC[:, -1] += (request.weight_RC - new_RC)[:, :-1] @ statistic.sums / statistic.weight
            solved.append((new_RC, request.mask_RC))
        return solved


def read_texts(path: str, min_words: int, count: int) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    texts = lines if path.endswith(".txt") else [json.loads(line)["sentence"] for line in lines]
    return [text for text in texts if len(text.split()) >= min_words][:count]


def embed(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Returns the mean of the last hidden states of each text, of length 1."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            keep = batch["attention_mask"][..., None]
            rows.append((model(**batch).last_hidden_state * keep).sum(1) / keep.sum(1))
    return nn.functional.normalize(torch.cat(rows), dim=1)


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Returns Spearman's correlation of the cosines of all pairs of rows."""
    pairs = torch.triu_indices(len(first), len(first), 1)
    ranks = [(rows @ rows.t())[pairs[0], pairs[1]].argsort().argsort().double() for rows in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


class Counts:
    """Counts the texts that pass through the first FFN, and the factorizations of least squares. A context manager."""

    def __init__(self, model: nn.Module):
        self._module = model.get_submodule(find_unit_groups(model, "neuron")[0].readers[0].name.rpartition(".")[0])
        self.rows = self.factors = 0

    def __enter__(self) -> Counts:
        self._context = ExitStack()
        self._context.enter_context(mock.patch.object(lstsq, "HessianFactor", self._factor))
        self._context.enter_context(self._module.register_forward_hook(self._count))
        return self

    def __exit__(self, *error: object) -> None:
        self._context.close()

    def _count(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.rows += len(args[0])

    def _factor(self, *args: Any) -> HessianFactor:
        self.factors += 1
        return HessianFactor(*args)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration_file")
    parser.add_argument("validation_file")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--min_words", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    calibration = read_texts(options.calibration_file, options.min_words, options.samples)
    texts = read_texts(options.validation_file, 1, options.texts)
    batches = [dict(tokenizer(calibration, padding=True, return_tensors="pt"))]
    validation = [
        dict(tokenizer(texts[start : start + 50], padding=True, return_tensors="pt"))
        for start in range(0, len(texts), 50)
    ]
    dense = embed(AutoModel.from_pretrained(options.model).eval(), validation)
    print(f"{len(calibration)} calibration texts, {int(batches[0]['attention_mask'].sum()):,} tokens")
    for row in options.rows:
        for method in options.methods:
            model = AutoModel.from_pretrained(options.model).eval()
            groups = {kind: {"pattern": kind, "target_sparsity": share} for kind, share in ROWS[row].items()}
            start = time.perf_counter()
            with Counts(model) as counts:
                prune_oneshot(model, batches, OneshotConfig(groups=groups, **METHODS[method]), progress=False)
            seconds, passes = time.perf_counter() - start, counts.rows / len(calibration)
            agreement = spearman(dense, embed(model, validation))
            costs = f"{passes:.2f} passes {counts.factors:3} factors {seconds:6.1f} s"
            print(f"{row:<12} {method:<17} {agreement:.4f}  {costs}", flush=True)


register_solver("bias")(MeanBias)


if __name__ == "__main__":
    main()
