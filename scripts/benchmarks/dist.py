"""Cost of a prune step of sharded weights: `python scripts/benchmarks/bench.py dist`.

Starts torchrun once for each mode, and prints for the worst rank

    received    bytes received in one prune step, counted at torch.distributed; as a fraction of the bytes of all
                selected weights; and the maximum of one collective
    calls       collectives of one prune step
    peak        memory beyond that before the step: of the CUDA allocator, or else the peak of the resident set since
                the step began (Linux resets it on demand), which includes buffers of gloo and of Python; and as a
                fraction of the bytes of the selected weights of the rank
    seconds     of one prune step and of one observation, wall-clock time

All are medians over the prune steps after the first. Weights and gradients are random.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from memory import extra_bytes
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from hf_sparse import PruningConfig
from hf_sparse.engine.pruner import Pruner


MODES = ("one", "ddp", "fsdp2", "zero1", "zero2", "zero3", "tp")
SETTINGS = {
    "magnitude global": {"criterion": "magnitude", "scope": "global"},
    "snip_momentum global": {"criterion": "snip_momentum", "scope": "global"},
    "magnitude 2:4": {"criterion": "magnitude", "pattern": "2:4"},
    "magnitude 4x1 layer": {"criterion": "magnitude", "pattern": "4x1", "scope": "layer"},
    "magnitude row": {"criterion": "magnitude", "scope": "row"},
}
# Their inputs are what tensor parallelism splits; of the others, the outputs.
SPLIT_INPUTS = ("o_proj.weight", "down_proj.weight", "output.dense.weight")
STEPS = 5
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def build(name: str) -> torch.nn.Module:
    """Returns a model with 10.6 million selected weights, with 85 million, or with few for tests."""
    torch.manual_seed(0)
    if name == "tiny":
        return LlamaModel(
            LlamaConfig(
                vocab_size=64,
                hidden_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=4,
                intermediate_size=128,
            )
        )
    if name == "minilm":
        return BertModel(
            BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        )
    if name == "bert":
        return BertModel(BertConfig())
    return LlamaModel(
        LlamaConfig(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=2048,
        )
    )


# How each mode splits a model


def split(model: torch.nn.Module, mode: str, device: str) -> torch.nn.Module:
    """Returns the model as the mode splits it, or an object that must live as long as the model."""
    model = model.to(device)
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if mode in ("fsdp2", "tp"):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device, (dist.get_world_size(),))
        (_fully_shard if mode == "fsdp2" else _tensor_parallel)(model, mesh)
    if mode.startswith("zero"):
        return _zero(model, int(mode[-1]))
    return model


def _fully_shard(model, mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _tensor_parallel(model, mesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            placement = Shard(int(f"{name}.weight".endswith(SPLIT_INPUTS)))
            weight = distribute_tensor(module.weight.data, mesh, [placement], src_data_rank=None)
            module.weight = torch.nn.Parameter(weight)


def _zero(model, stage: int):
    import deepspeed

    zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=config)[0]


def fill(pruner: Pruner) -> None:
    """Sets random weights, and gradients of the same layout. ZeRO has gradients during a step only, so they are set
    where its shards keep them."""
    from torch.distributed.tensor import DTensor

    # Replicas on several ranks must be equal, and the parts of one weight must differ.
    torch.manual_seed(pruner.communicator.rank)
    for shard in pruner.shards.values():
        gradient, parameter = torch.randn_like(shard.tensor), shard.parameter
        shard.tensor.normal_()
        if hasattr(shard, "_gradient"):
            shard._gradient = gradient
        elif isinstance(parameter, DTensor):
            rest = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
            parameter.grad = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements, **rest)
        else:
            parameter.grad = gradient


# What is counted


class Counter:
    """Counts the collectives of this process and the bytes that it receives."""

    def __init__(self):
        self.calls = self.received = self.largest = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts while the context is open. Savings of ring or tree algorithms for an all_reduce are ignored."""
        names = ("all_reduce", "all_gather", "all_to_all_single")
        originals = {name: getattr(dist, name) for name in names}
        for name in names:
            setattr(dist, name, self._counted(name, originals[name]))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _counted(self, name: str, original: Callable) -> Callable:
        def call(first, *rest, **named):
            done = original(first, *rest, **named)
            others = dist.get_world_size() - 1
            if name == "all_reduce":
                brought = first.nbytes * others
            elif name == "all_gather":
                brought = first[0].nbytes * others
            else:
                sizes = rest[1] if len(rest) > 1 else None
                own = sizes[dist.get_rank()] * first.element_size() if sizes else first.nbytes // (others + 1)
                brought = first.nbytes - own
            self.calls += 1
            self.received += brought
            self.largest = max(self.largest, brought)
            return done

        return call


def peak(work: Callable[[], object], device: str) -> int:
    """Returns the peak memory of `work` beyond the memory before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    return extra_bytes(work)


def seconds(work: Callable[[], object], device: str) -> float:
    """Returns the time from when all ranks are ready until this rank has finished."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: torch.nn.Module, setting: str, device: str) -> dict[str, float]:
    """Measures the prune steps of one pruner on this rank."""
    target = {} if ":" in setting else {"target_sparsity": 0.8}
    pruner = Pruner(model, PruningConfig(**target, **SETTINGS[setting]))
    fill(pruner)
    found, observe = [], []
    for prune_step in range(1, STEPS + 1):
        if pruner.observes:
            observe.append(seconds(pruner.observe, device))
        counter, took = Counter(), []
        with counter.counting():
            extra = peak(lambda: took.append(seconds(partial(pruner.update, prune_step, STEPS), device)), device)
        found.append({"peak": extra, "seconds": took[0]} | vars(counter))
    figures = {name: statistics.median(step[name] for step in found[1:]) for name in found[0]}
    shards = pruner.shards.values()
    return figures | {
        "weights": sum(shard.shape.numel() * shard.tensor.element_size() for shard in shards),
        "held": sum(shard.tensor.nbytes for shard in shards),
        "observe": statistics.median(observe[1:]) if observe else 0.0,
    }


def work_on(options: argparse.Namespace) -> None:
    """Runs one mode with all settings, on every rank."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.worker != "one":
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(BACKENDS[device])
    model = build(options.model)
    alive = split(model, options.worker, device)
    results = {setting: measure(model, setting, device) for setting in options.settings}
    del alive
    rank = os.environ.get("RANK", "0")
    (Path(options.folder) / f"{options.worker}-{rank}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)  # at an ordinary exit gloo's threads abort the process now and then, with all written


# The table


def run(options: argparse.Namespace) -> None:
    if options.worker:
        work_on(options)
        return
    modes = [mode for mode in options.modes if not mode.startswith("zero") or importlib.util.find_spec("deepspeed")]
    print(
        f"{options.model}, {options.processes} processes of one thread; the worst rank, medians of {STEPS - 1} steps"
    )
    row = "{:6s} {:21s} {:>10s} {:>7s} {:>10s} {:>6s} {:>10s} {:>7s} {:>9s} {:>9s}"
    head = ("mode", "setting", "received", "weights", "largest", "calls", "peak", "shard", "prune s", "observe s")
    print(row.format(*head), flush=True)
    for mode in modes:
        with tempfile.TemporaryDirectory() as folder:
            _start(mode, folder, options)
            ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
        for setting in options.settings:
            found = [rank[setting] for rank in ranks]
            if not options.every_rank:
                found = [{name: max(rank[name] for rank in found) for name in found[0]}]
            for one in found:
                print(row.format(mode, setting, *_cells(one)), flush=True)


def _cells(found: dict[str, float]) -> list[str]:
    return [
        f"{found['received'] / 1e3:.0f} kB",
        f"{found['received'] / found['weights']:.2%}",
        f"{found['largest'] / 1e3:.0f} kB",
        f"{found['calls']:.0f}",
        f"{found['peak'] / 1e6:.1f} MB",
        f"{found['peak'] / found['held']:.0%}" if found["held"] else "",
        f"{found['seconds']:.3f}",
        f"{found['observe']:.3f}" if found["observe"] else "",
    ]


def _start(mode: str, folder: str, options: argparse.Namespace) -> None:
    here = Path(__file__).parent
    start = [sys.executable]
    if mode != "one":
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    bench = [str(here / "bench.py"), "dist", "--worker", mode, "--folder", folder, "--model", options.model]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(here.parents[1])])),
    }
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*start, *bench, "--settings", *options.settings], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{mode} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", choices=["minilm", "bert", "llama", "tiny"], default="minilm")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--every-rank", action="store_true", help="print a line for each rank, not for the worst only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
