"""Run by torchrun on every rank: prune steps of two layers of a million weights each, sharded along either dimension,
compared with a pruner of whole weights. Prints one line for each setting: an error, or that all is within limits."""

import copy
import os
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_sparse import PruningConfig
from hf_sparse.engine.pruner import Pruner


SIZE = 1024
# Limit of the bytes that collectives may fill, including a rank's own part, as a fraction of the weights' bytes.
SETTINGS = {
    0.06: [
        {"pattern": "unstructured", "scope": "global", "target_sparsity": 0.8},
        {"pattern": "unstructured", "scope": "layer", "target_sparsity": 0.8},
        {"pattern": "4x1", "scope": "layer", "target_sparsity": 0.8},
        {"pattern": "2x2", "scope": "global", "target_sparsity": 0.8},
        {"pattern": "2:4"},
    ],
    # Rows that are split over ranks are redistributed, half of a layer to each rank, and their masks sent back.
    0.30: [{"pattern": "unstructured", "scope": "row", "target_sparsity": 0.8}],
}


def split(model, mesh):
    for dim, layer in enumerate(model):
        weight = distribute_tensor(layer.weight.data.clone(), mesh, [Shard(dim)])
        layer.weight = nn.Parameter(weight)
    return model


def recorded(original, seen, *args):
    """Calls a collective of torch and records the number of bytes that it fills."""
    done = original(*args)
    into = args[0] if isinstance(args[0], list) else [args[0]]
    seen.append(sum(tensor.nbytes for tensor in into))
    return done


def problem(options, share, mesh):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False))
    sharded = split(copy.deepcopy(whole), mesh)
    config = PruningConfig(criterion="magnitude", **options)
    expected, pruner = Pruner(whole, config), Pruner(sharded, config)
    for prune_step in (1, 2, 3):
        expected.update(prune_step, 3)
        seen, names = [], ("all_reduce", "all_gather", "all_to_all_single")
        originals = {name: getattr(dist, name) for name in names}
        for name, original in originals.items():
            setattr(dist, name, partial(recorded, original, seen))
        try:
            pruner.update(prune_step, 3)
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)
        most = share * sum(weight.numel() * 4 for weight in whole.parameters())
        if sum(seen) > most:
            return f"{len(seen)} collectives filled {sum(seen)} bytes, more than {most:.0f}"
        if len(seen) > 20:
            return f"{len(seen)} collectives for two layers"
        for dim, name in enumerate(pruner.shards):
            own = expected.masks[name].chunk(dist.get_world_size(), dim)[dist.get_rank()]
            if not torch.equal(pruner.masks[name], own):
                return f"masks of {name} differ at prune step {prune_step}"
    return None


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = [(options, problem(options, share, mesh)) for share, some in SETTINGS.items() for options in some]
    for options, error in results:
        print(f"{options}: {error or 'within limits'}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(
        int(any(error for _, error in results))
    )  # at an ordinary exit, threads of gloo sometimes abort the process


if __name__ == "__main__":
    main()
