"""Run by torchrun on every rank: compares one-shot pruning with the data split over ranks with one process.

The argument is a folder for finished blocks. Prints one line for each difference, and the number of checks.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers.architectures import ARCHITECTURES
from helpers.evaluations import KINDS, batches_of, perturb
from helpers.tiny import same, weights
from torch import nn

from hf_sparse import OneshotConfig, evaluate_model, prune_oneshot, reference_outputs
from hf_sparse.config import PruningConfigError
from hf_sparse.distributed import SINGLE_PROCESS
from hf_sparse.statistics import InputNorms


RUNS = {
    "wanda": {},
    "wanda 2:4": {"pattern": "2:4"},
    "sparsegpt": {"solver": "sparsegpt"},
    "swaps and sparsegpt": {"criterion": "wanda", "solver": "sparsegpt", "swaps": 3},
    "owl": {"allocation": "owl"},
    "dlp": {"allocation": "dlp"},
    "lsa": {"allocation": "lsa", "solver": "sparsegpt"},
    "global budget": {"allocation": "global"},
    "global": {"scope": "global"},
    "snip": {"criterion": "snip"},
    "fisher and sparsegpt": {"criterion": "fisher", "solver": "sparsegpt"},
    "one forward": {"forwards": 1, "solver": "sparsegpt"},
    "magnitude": {"criterion": "magnitude"},
    "neurons": {"pattern": "neuron:1", "target_sparsity": 0.5},
    "neurons by obs, two forwards": {"pattern": "neuron:1", "target_sparsity": 0.5, "criterion": "obs", "forwards": 2},
    "heads by their masks": {"pattern": "head", "target_sparsity": 0.5, "criterion": "taylor"},
    "layers": {"pattern": "layer", "target_sparsity": 0.5},
    "permuted 2:4": {"pattern": "2:4", "permute": True},
    "permuted sparsegpt": {"pattern": "2:4", "permute": True, "solver": "sparsegpt"},
    "reconstruct": {"reconstruct": True, "reconstruct_kwargs": {"steps": 12, "samples": 4}},
    # With a given learning rate nothing is tried, which takes most of the time.
    "reconstruct at one rate": {
        "reconstruct": True,
        "reconstruct_kwargs": {"steps": 6, "samples": 4, "learning_rate": 0.01},
    },
    "reconstruct from dense inputs": {
        "reconstruct": True,
        "reconstruct_kwargs": {"steps": 6, "samples": 4, "window": 1, "inputs": "dense", "learning_rate": 0.01},
    },
    "reconstruct after sparsegpt": {
        "reconstruct": True,
        "solver": "sparsegpt",
        "reconstruct_kwargs": {"steps": 6, "learning_rate": 0.01},
    },
}
FAMILIES = {
    "llama": [*RUNS],
    "t5": [
        "wanda",
        "sparsegpt",
        "owl",
        "global budget",
        "neurons",
        "reconstruct at one rate",
        "reconstruct from dense inputs",
    ],
    "qwen3_moe": ["wanda", "swaps and sparsegpt", "owl", "lsa", "neurons", "reconstruct at one rate"],
    "bert": ["reconstruct at one rate"],
}


def prune(model, batches, folder=None, **options):
    if options.get("pattern") is None:
        options["target_sparsity"] = 0.5
    return prune_oneshot(model, batches, OneshotConfig(on_unreached="magnitude", **options), folder, progress=False)


def difference(name, options, batches):
    """Returns what differs from one process, or None."""
    architecture = ARCHITECTURES[name]
    found, alone = architecture.model(), architecture.model()
    report = prune(found, batches, **options)
    with mock.patch("hf_sparse.oneshot.prepare.get_communicator", lambda: SINGLE_PROCESS):
        expected = prune(alone, batches, **options)
    if report.zeros != expected.zeros:
        return "reports"
    for key, weight in weights(alone).items():
        other = found.state_dict()[key]
        if not torch.equal(other == 0, weight == 0):
            return f"the mask of {key}"
        if not torch.allclose(other, weight, rtol=1e-3, atol=1e-4):
            return key
        gathered = [torch.empty_like(other) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, other.contiguous())
        if not all(torch.equal(weight, other) for weight in gathered):
            return f"{key} between ranks"
    return None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x):
        if x.max() > 1e6:
            raise RuntimeError("this one is too much")
        return x + self.up(x)


def raised(batches, seed=0, **options):
    """Returns the error of a run, and whether this rank's model is unchanged."""
    torch.manual_seed(seed)
    model = nn.Sequential(Block(), Block())
    before = weights(model)
    try:
        prune(model, batches, **options)
    except (ValueError, RuntimeError) as error:
        return type(error), str(error), same(weights(model), before)
    return None, "", False


def error_checks(rank):
    """Yields (name, whether it holds) of checks that all ranks raise together."""
    torch.manual_seed(1)
    batches = [torch.randn(4, 6) for _ in range(4)]
    for forwards in (1, 2):
        broken = [batch.clone() for batch in batches]
        broken[3][0, 0] = torch.nan  # a batch of rank 1
        kind, text, untouched = raised(broken, forwards=forwards)
        words = 'inputs of "0.up.weight": inputs must be finite' if rank == 1 else "another process stopped"
        yield f"nan, {forwards} forwards: {text}", kind is ValueError and words in text and untouched
        broken[3][0, 0] = 1e7
        kind, text, untouched = raised(broken, forwards=forwards)
        words = "this one is too much" if rank == 1 else "another process stopped"
        yield f"what a model raises, {forwards} forwards: {text}", words in text and untouched
    kind, text, untouched = raised(batches[:1])
    yield "few batches", kind is PruningConfigError and "1 calibration batches are too few for 2 processes" in text
    kind, text, _ = raised(batches, seed=rank)
    yield f"other weights: {text}", kind is RuntimeError and 'pruned different weights of "0.up.weight"' in text


def evaluated(kind, sizes):
    model, batches = KINDS[kind][0](), batches_of(kind, *sizes)
    reference = reference_outputs(model, batches)
    return evaluate_model(perturb(model), batches, reference)


def evaluation_checks(rank):
    """Yields (name, whether it holds) of checks that evaluation is that of one process, bit for bit."""
    for kind in KINDS:
        for sizes in ((2, 3, 1), (6,)):  # the last leaves the second rank without a batch
            found = evaluated(kind, sizes)
            with mock.patch("hf_sparse.evaluation.evaluate.get_communicator", lambda: SINGLE_PROCESS):
                alone = evaluated(kind, sizes)
            yield f"evaluation of {kind}, {sizes}: {found} {alone}", found == alone
    model, batches = KINDS["classes"][0](), batches_of("classes", 3, 3)
    batches[1]["input_ids"] += 10**6  # a batch of rank 1
    try:
        evaluate_model(model, batches)
        text = ""
    except (ValueError, IndexError) as error:
        text = str(error)
    yield f"what evaluation raises: {text}", ("index out of range" if rank == 1 else "another process stopped") in text


def resumed(folder, rank, **options):
    """Whether a run that is interrupted on all ranks after its first block resumes to the same weights."""
    architecture = ARCHITECTURES["llama"]
    batches, cut, again, alone = architecture.batches(), *(architecture.model() for _ in range(3))
    real, calls = InputNorms.__init__, []

    def observe(self, *arguments):
        calls.append(self)
        if len(calls) > 4:
            raise KeyboardInterrupt
        real(self, *arguments)

    with mock.patch.object(InputNorms, "__init__", observe):
        try:
            prune(cut, batches, folder, **options)
        except KeyboardInterrupt:
            pass
    dist.barrier()
    written = sorted(path.name for path in Path(folder).iterdir())
    prune(again, batches, folder, **options)
    prune(alone, batches, **options)
    return written == ["stage-00000.safetensors"] and same(weights(again), weights(alone))


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, wrong = dist.get_rank(), 0
    checks = []
    for name, runs in FAMILIES.items():
        for kind in runs:
            problem = difference(name, dict(RUNS[kind]), ARCHITECTURES[name].batches(3))
            checks.append((f"{name}, {kind}: {problem}", problem is None))
    checks += error_checks(rank)
    checks += evaluation_checks(rank)
    checks.append(("resume", resumed(f"{sys.argv[1]}/plain", rank)))
    checks.append(("resume with reconstruct", resumed(f"{sys.argv[1]}/tuned", rank, **RUNS["reconstruct"])))
    for name, right in checks:
        if not right:
            wrong += 1
            print(f"WRONG on {rank}: {name}", flush=True)
    print(f"{len(checks)} checks, {wrong} wrong", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(int(wrong > 0))  # at an ordinary exit, threads of gloo sometimes abort the process


if __name__ == "__main__":
    main()
