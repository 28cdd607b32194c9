"""A prune step of coupled units, as a ratio to one of single weights: `python scripts/benchmarks/bench.py structured`.

Both prune the same weights of a BERT with the shape of MiniLM-L6 from 0 to 50 % in two prune steps, in turn, so that
load on the machine affects them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import BertConfig, BertModel

from hf_sparse import Pruner, PruningConfig


TARGETS = {
    "neuron": ["*.intermediate.dense", "re:layer\\.\\d+\\.output\\.dense"],
    "head": ["*.query", "*.key", "*.value", "*.attention.output.dense"],
}


def seconds(pruner: Pruner) -> float:
    """Returns the time of two prune steps, from masks that prune nothing."""
    (group,) = pruner.groups
    for name, mask in pruner.masks.items():
        pruner.masks.replace(name, torch.ones_like(mask))
    start = time.perf_counter()
    for prune_step in (1, 2):
        group.prune(prune_step, 2, pruner.shards, pruner.masks)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_pruner(model: BertModel, pattern: str, targets: list[str], criterion: str) -> Pruner:
    options = {"pattern": pattern, "targets": targets, "scope": "layer", "criterion": criterion}
    pruner = Pruner(model, PruningConfig(target_sparsity=0.5, initial_sparsity=0.1, **options))
    pruner.observe()
    return pruner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "snip_momentum"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384, help="a multiple of 32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "num_attention_heads": options.hidden // 32}
    sizes |= {"num_hidden_layers": options.layers, "intermediate_size": 4 * options.hidden}
    model = BertModel(BertConfig(**sizes)).to("cuda" if torch.cuda.is_available() else "cpu")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for pattern, targets in TARGETS.items():
            for criterion in options.criteria:
                pruners = [make_pruner(model, name, targets, criterion) for name in (pattern, "unstructured")]
                times = [[seconds(pruner) for pruner in pruners] for _ in range(options.repeats + 1)][1:]
                ratios = sorted(coupled / single for coupled, single in times)
                print(
                    f"{pattern:6s} {criterion:13s} {threads} thread(s): single weights "
                    f"{statistics.median(single for _, single in times) / 2 * 1e3:.1f} ms, ratio "
                    f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                )
