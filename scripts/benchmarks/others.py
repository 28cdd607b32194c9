"""A prune step and a training step in other ways: `python scripts/benchmarks/bench.py others`.

The same BERT pruned by hf_sparse, by `torch.nn.utils.prune` and by `torch.ao.pruning`, which come with torch: 80% of
single weights by magnitude over all layers, and 2:4. With one thread, CPU time is measured. Every way is repeated in
turns with the others; figures are medians of ratios of times measured next to each other.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from ranking import read, seconds_once
from step import new_model
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from hf_sparse import Pruner, PruningConfig


TARGET = 0.8
Prepare = Callable[[nn.Module], Callable[[], object]]


def new_pruner(model: nn.Module, criterion: str = "magnitude", **options: Any) -> Pruner:
    return Pruner(model, PruningConfig(criterion=criterion, **(options or {"target_sparsity": TARGET})))


def selected(model: nn.Module) -> list[str]:
    """Names of the modules that hf_sparse selects by default."""
    return [layer.module for layer in new_pruner(model).groups[0].layers]


def with_hf_sparse(model: nn.Module, **options: Any) -> Callable[[], object]:
    pruner = new_pruner(model, **options)
    return lambda: pruner.update(1, 1)


def with_nn_utils_prune(model: nn.Module) -> Callable[[], object]:
    parameters = [(model.get_submodule(name), "weight") for name in selected(model)]
    return lambda: prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=TARGET)


def with_ao_pruning(model: nn.Module) -> Callable[[], object]:
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in selected(model)])

    def step() -> None:
        sparsifier.step()
        sparsifier.squash_mask()  # writes the zeros into the weights

    return step


WAYS: dict[str, dict[str, Prepare]] = {
    f"{TARGET:.0%} of single weights": {
        "hf_sparse": with_hf_sparse,
        "torch.nn.utils.prune": with_nn_utils_prune,
    },
    "2:4": {
        "hf_sparse": partial(with_hf_sparse, pattern="2:4"),
        "torch.ao.pruning": with_ao_pruning,
    },
}
"""Comparison -> way -> what it does to a dense model before the clock starts; it returns the prune step."""


def measure_in_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the time of each work relative to that of the first, which each is measured beside."""
    reference, *_ = works
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):  # the first round is not counted
        times = {name: seconds_once(work) for name, work in works.items()}
        for name, time in times.items():
            ratios[name].append(time / times[reference])
    return {name: statistics.median(values[1:]) for name, values in ratios.items()}


def step_works(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """One training step of a model that is not pruned, and of models that are."""
    batch = {"input_ids": torch.randint(0, 30_000, (options.batch, options.tokens))}
    batch["labels"] = torch.ones(options.batch, dtype=torch.long)

    def step_of(model: nn.Module, before: Callable[[], object], after: Callable[[], object]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)

        def step() -> None:
            model(**batch).loss.backward()
            before()
            optimizer.step()
            after()
            optimizer.zero_grad()

        return step

    plain, masked, reparametrized, observed = (new_model(options) for _ in range(4))
    masks, observer = new_pruner(masked), new_pruner(observed, "snip_momentum", target_sparsity=TARGET)
    observed(**batch).loss.backward()
    observer.observe()
    for pruner in (masks, observer):
        pruner.update(1, 1)
    with_nn_utils_prune(reparametrized)()
    return {
        "plain": step_of(plain, int, int),
        "hf_sparse": step_of(masked, int, masks.apply_masks),
        "hf_sparse, snip_momentum": step_of(observed, observer.observe, observer.apply_masks),
        "torch.nn.utils.prune": step_of(reparametrized, int, int),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384, help="a multiple of 32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    dense = new_model(options)
    names = selected(dense)
    weights = [dense.get_submodule(name).weight.detach() for name in names]
    count = sum(weight.numel() for weight in weights)
    print(f"\na prune step over {count:,} weights, in reads of them (the time of a sum of each)")
    for title, ways in WAYS.items():
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):  # the first is not counted
            for name, prepare in ways.items():
                model = copy.deepcopy(dense)
                prune_step = prepare(model)
                one_read = statistics.median(seconds_once(lambda: read(weights)) for _ in range(3))
                ratios[name] += [seconds_once(prune_step) / one_read] * (repeat > 0)
                if repeat == options.repeats:
                    zeros = sum(int((model.get_submodule(layer).weight == 0).sum()) for layer in names)
                    changed = len(model.state_dict().keys() ^ dense.state_dict().keys())
                    found = f"{statistics.median(ratios[name]):7.1f} reads, {zeros / count:.6f} zero"
                    print(f"{title:24s} {name:22s} {found}, {changed} state-dict keys changed", flush=True)
    print(f"\na training step of {options.batch} x {options.tokens} tokens, relative to one without pruning")
    for name, ratio in measure_in_turns(step_works(options), options.repeats).items():
        print(f"{name:26s} {ratio:.3f}")
