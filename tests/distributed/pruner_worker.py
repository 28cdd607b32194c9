"""Run by torchrun on every rank: compares a pruner of sharded weights with one of whole weights.

Prints one line for each case in which they differ, and the number of cases.
"""

import itertools
import os
import sys
import traceback
from functools import partial

import torch
import torch.distributed as dist
from helpers.mixed import NAMES, Mixed
from helpers.model_types import MODEL_TYPES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_sparse import PruningConfig, Requires
from hf_sparse.config import PruningConfigError
from hf_sparse.criteria import CRITERIA
from hf_sparse.engine.pruner import Pruner
from hf_sparse.model.coupling import find_unit_groups


# Placements of the weights NAMES, by layout. Where the number of rows is odd or below the number of ranks, some ranks
# hold more than others, or nothing.
LAYOUTS = {
    "first": [[Shard(0)]] * 5,
    "second": [[Shard(1)]] * 5,
    "last": [[Shard(1)], [Shard(1)], [Shard(2)], [Shard(2)], [Shard(2)]],
    "mixed": [None, [Shard(1)], [Shard(0)], [Shard(0)], [Shard(2)]],
    "copies": [[Replicate()], [Shard(0)], None, [Replicate()], [Shard(1)]],
}
GRIDS = {
    "grid": [[Shard(0), Shard(1)]] * 5,
    "hybrid": [[Replicate(), Shard(0)]] * 5,
}
PATTERNS = ["unstructured", "2:4", "1:4", "4x1", "2x2", "channel", "channel:in"]
SCOPES = ["row", "layer", "global"]
# (number of scores to collect without a search, chunk size): the second makes small layers take the way of large ones.
SIZES = ((4096, 262_080), (3, 40))
OTHERS = [
    {"pattern": "unstructured", "algorithm": "granet", "criterion": "snip"},
    {"pattern": "4x1", "algorithm": "rigl"},
    {"pattern": "2:4", "algorithm": "rigl", "scope": "global"},
    {"pattern": "2:4", "algorithm": "set", "algorithm_kwargs": {"initial_mask": "random"}},
    {"pattern": "unstructured", "algorithm": "set", "scope": "row"},
    {"pattern": "unstructured", "keep_zeros": True, "criterion": "magnitude"},
    {"pattern": "2:4", "keep_zeros": True, "criterion": "magnitude", "scope": "row"},
    {"pattern": "unstructured", "max_sparsity_per_layer": 0.7, "min_sparsity_per_layer": 0.2, "criterion": "taylor"},
    {"pattern": "unstructured", "allocation": "erdos_renyi", "criterion": "snip_momentum"},
    *(
        {"pattern": pattern, "criterion": "obert", "criterion_kwargs": {"block_size": 4}, "scope": "layer"}
        for pattern in ("unstructured", "2x2", "2:4")
    ),
    *({"pattern": pattern, "criterion": "mfac", "scope": "layer"} for pattern in ("unstructured", "2x2")),
]


# Coupled units: number of the parameter and its dimensions -> placements.
UNIT_LAYOUTS = {
    "first": lambda number, ndim: [Shard(0)],
    "last": lambda number, ndim: [Shard(ndim - 1)],
    "mixed": lambda number, ndim: [None, [Shard(0)], [Shard(ndim - 1)], [Replicate()]][number % 4],
}
# Key-value groups; rows of Conv1D in the second dimension; fused matrices; experts of three dimensions.
UNIT_MODELS = ("bert", "gpt2", "phi3", "mixtral")
UNITS = [
    {"pattern": "neuron", "scope": "global", "criterion": "snip"},
    {"pattern": "neuron:1", "criterion": "random"},
    {"pattern": "head", "criterion": "taylor"},
    {"pattern": "layer", "criterion": "magnitude"},
    {"pattern": "neuron:1", "criterion": "magnitude", "keep_zeros": True},
    {"pattern": "neuron:1", "criterion": "obert"},
    {"groups": {"ffn": {"pattern": "neuron"}, "attention": {"pattern": "head", "criterion": "fisher"}}},
]


def make_units(name):
    """A model of one or two blocks. Eighths between -2 and 2, as in `Mixed`."""
    model, generator = MODEL_TYPES[name].make(num_hidden_layers=2), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.data.copy_(torch.randint(1, 17, parameter.shape, generator=generator) / 8 * signs)
    return model


def split(model, placements, mesh):
    """Replaces weights by DTensors, those without placements stay whole."""
    for name, parameter in list(model.named_parameters()):
        if placements.get(name) is None:
            continue
        path, _, own = name.rpartition(".")
        weight = distribute_tensor(parameter.data.clone(), mesh, placements[name])
        setattr(model.get_submodule(path), own, nn.Parameter(weight))
    return model


def give_gradients(model, whole):
    """Gives a sharded model the gradients of the whole model."""
    gradients = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = gradients[name].grad
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def full(parameter, local):
    """Returns the full tensor of which `local` is this rank's part, gathered from all ranks."""
    if not isinstance(parameter, DTensor):
        return local
    rest = {"shape": parameter.shape, "stride": parameter.stride()}
    placed = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, **rest)
    return placed.full_tensor()


def difference(make, options, layout, mesh, constant):
    """Returns what differs between the two pruners, or None. With `constant`, all weights are equal."""
    whole, sharded = make(), make()
    for model in (whole, sharded) if constant else ():
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
    if options.get("keep_zeros"):
        for parameter in itertools.chain(whole.parameters(), sharded.parameters()):
            parameter.data[parameter.abs() < 0.5] = 0.0
    split(sharded, layout, mesh)
    config = PruningConfig(**options)
    pruners = [Pruner(whole, config), Pruner(sharded, config)]
    for pruner in pruners:
        pruner.start_sparse()
    for prune_step in (1, 2, 3):
        Mixed.fake_gradients(whole, prune_step)
        give_gradients(sharded, whole)
        for pruner in pruners:
            pruner.observe()
        reports = [pruner.update(prune_step, 3) for pruner in pruners]
        if reports[0].to_dict() != reports[1].to_dict():
            return f"reports differ at prune step {prune_step}: {reports[0].zeros}, {reports[1].zeros} zeros"
        if pruners[0].sparsity() != pruners[1].sparsity():
            return "sparsities differ"
        for name, shard in pruners[1].shards.items():
            kept = full(shard.parameter, pruners[1].masks[name].float()) != 0
            if not torch.equal(pruners[0].masks[name], kept):
                return f"masks of {name} differ at prune step {prune_step}"
            local = shard.tensor
            if not torch.equal(pruners[0].shards[name].tensor, full(shard.parameter, local)):
                return f"weights of {name} differ at prune step {prune_step}"
            if torch.count_nonzero(local[~pruners[1].masks[name]]) or torch.signbit(local[local == 0]).any():
                return f"{name} is not +0.0 where it is pruned"
    return None


def cases(world, everything):
    meshes = {name: init_device_mesh("cpu", (world,)) for name in LAYOUTS}
    layouts = LAYOUTS
    if world == 4:
        layouts = LAYOUTS | GRIDS
        meshes |= {name: init_device_mesh("cpu", (2, 2)) for name in GRIDS}
    layouts = {name: dict(zip(NAMES, layout, strict=True)) for name, layout in layouts.items()}
    turn, make_mixed = itertools.count(), partial(Mixed, seed=3)
    for layout, pattern, scope in itertools.product(layouts, PATTERNS, SCOPES):
        criteria = [name for name in CRITERIA.names() if not CRITERIA[name].requires & Requires.INPUTS]
        for criterion in criteria if everything else [criteria[next(turn) % len(criteria)]]:
            options = {"pattern": pattern, "scope": scope, "criterion": criterion}
            yield make_mixed, options, layouts[layout], meshes[layout], layout, False
        if everything or layout == "mixed":
            yield make_mixed, options | {"criterion": "magnitude"}, layouts[layout], meshes[layout], layout, True
    for layout, options in itertools.product(layouts if everything else ["second", "mixed"], OTHERS):
        yield make_mixed, options, layouts[layout], meshes[layout], layout, False
    for name, layout in itertools.product(UNIT_MODELS, UNIT_LAYOUTS):
        model = make_units(name)
        groups = itertools.chain(*(find_unit_groups(model, kind) for kind in ("neuron", "head", "layer")))
        parts = enumerate(dict.fromkeys(own for group in groups for own in group.parameters))
        placements = {own: UNIT_LAYOUTS[layout](number, model.get_parameter(own).ndim) for number, own in parts}
        for options in UNITS if everything else [UNITS[next(turn) % len(UNITS)]]:
            make = partial(make_units, name)
            yield make, options, placements, meshes["first"], f"{name} {layout}", next(turn) % 3 == 0


def main():
    from hf_sparse import numerics
    from hf_sparse.selection import bracket

    dist.init_process_group("gloo")
    count = wrong = 0
    everything = "everything" in sys.argv
    turn = itertools.cycle(SIZES)
    for make, options, layout, mesh, name, constant in cases(dist.get_world_size(), everything):
        if options.get("pattern") not in ("2:4", "1:4"):
            options = options | {"target_sparsity": 0.6}
        try:
            for few, chunk in SIZES if everything else [next(turn)]:
                bracket._MIN_SAMPLED, numerics.CPU_CHUNK = few, chunk
                problem = difference(make, options, layout, mesh, constant)
                count += 1
                if problem:
                    wrong += 1
                    print(f"WRONG {name} {options} constant={constant} few={few}: {problem}", flush=True)
        except PruningConfigError:
            continue  # invalid in one process as well
        except Exception:
            print(f"FAILED {name} {options} constant={constant}", flush=True)
            traceback.print_exc()
            sys.exit(1)
    print(f"{count} cases, {wrong} wrong", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(int(wrong > 0))  # at an ordinary exit, threads of gloo sometimes abort the process


if __name__ == "__main__":
    main()
