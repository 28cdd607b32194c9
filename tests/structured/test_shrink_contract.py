"""The law of `shrink`, for each model type in its table: a dense model with zeros and the smaller model give the same
outputs and generate the same tokens, in memory and after plain `from_pretrained` in a process without hf_sparse."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_sparse.model.coupling import find_unit_groups
from hf_sparse.structured.config_fields import CONFIG_FIELDS
from hf_sparse.structured.obstacles import shrink_obstacle
from hf_sparse.structured.shrink import plan_shrink, shrink
from tests.helpers.model_types import MODEL_TYPES


# Opens each folder with the Auto class and compares it with the outputs that were saved beside the model.
OPEN_PLAIN = """
import json, sys
sys.modules["hf_sparse"] = None  # an import of it raises
import torch, transformers
from safetensors.torch import load_file

differences = {}
for folder, auto in json.loads(sys.argv[1]).items():
    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, report)
    saved = load_file(f"{folder}/outputs.safetensors")
    expected = saved.pop("expected")
    with torch.no_grad():
        found = next(iter(model(**saved).values()))
    differences[folder] = float((found - expected).abs().max() / expected.abs().max())
print(json.dumps(differences))
"""


@pytest.fixture(params=MODEL_TYPES)
def name(request):
    return request.param


@torch.no_grad()
def prune(model: nn.Module, kinds: tuple[str, ...]) -> None:
    """Zeroes half of the heads, 16 of 24 neurons, other ones in each layer, and the second block of each stack."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(5)
    for kind in kinds:
        for group in find_unit_groups(model, kind):
            count = {"neuron": 16, "head": group.num_units // 2, "layer": int(group.name.endswith(".1"))}[kind]
            units = torch.randperm(group.num_units, generator=generator)[:count]
            for part in group.slices:
                tensor = parameters[part.name]
                whole = tensor if part.expert is None else tensor[part.expert]
                whole.index_fill_(part.dim - (part.expert is not None), part.indices(units), 0)


@torch.no_grad()
def first_output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(model(**inputs).values()))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and float(expected.std()) > 0.01
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def generate(model: nn.Module, inputs: dict[str, torch.Tensor], **options) -> list[list[int]]:
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options).tolist()


def tied(model: nn.Module) -> list[list[str]]:
    """The names of the parameters that are the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def test_every_row_of_the_table_is_tested():
    assert CONFIG_FIELDS.keys() == MODEL_TYPES.keys()


def test_outputs_and_generated_tokens_are_the_same(name):
    model_type = MODEL_TYPES[name]
    dense = model_type.make()
    prune(dense, model_type.kinds)
    random_state = torch.get_rng_state()
    small = shrink(dense, verify=False)
    assert torch.equal(torch.get_rng_state(), random_state)  # nothing is initialized at random
    assert type(small) is type(dense) and not small.training and tied(small) == tied(dense)

    sizes = {"neuron": (24, 8), "head": (4, 2), "layer": (3, 2)}
    expected = [sizes[kind] for kind in ("layer", "neuron", "head") if kind in model_type.kinds]
    changes = [(change.before, change.after) for change in plan_shrink(dense).changes]
    assert sorted(set(changes)) == sorted({tuple(change) for change in expected})
    groups = [(group.kind, group.num_units) for kind in model_type.kinds for group in find_unit_groups(small, kind)]
    units_of_heads = {"head": {2, 1}, "neuron": {8}, "layer": {1}}
    assert all(number in units_of_heads[kind] for kind, number in groups)

    assert_close(first_output(small, model_type.inputs()), first_output(dense, model_type.inputs()))
    if model_type.generates:
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            tokens = generate(dense, model_type.inputs(), **options)
            assert generate(small, model_type.inputs(), **options) == tokens


def test_kinds_that_the_config_cannot_express_are_said_and_stay(name):
    model_type = MODEL_TYPES[name]
    dense = model_type.make()
    missing = tuple(kind for kind in ("neuron", "head", "layer") if kind not in model_type.kinds)
    assert {kind for kind in ("neuron", "head", "layer") if shrink_obstacle(dense, kind)} == set(missing)
    prune(dense, missing)
    plan = plan_shrink(dense)
    assert not plan.changes and len(plan.kept) >= len(missing) and plan.parameters[0] == plan.parameters[1]


def test_blocks_can_be_named(name):
    """In models after whose blocks there is a norm as well."""
    model_type = MODEL_TYPES[name]
    dense = model_type.make()
    small = shrink(dense, layers={stack: [0, 2] for stack in model_type.stacks})
    for stack in model_type.stacks:
        assert len(small.get_submodule(stack)) == 2
        block = dense.get_submodule(f"{stack}.1")
        block.forward = skip(block.forward)
    assert_close(first_output(small, model_type.inputs()), first_output(dense, model_type.inputs()))
    if model_type.generates:  # each block has its place in the cache
        with_cache, without = (generate(small, model_type.inputs(), use_cache=cache) for cache in (True, False))
        assert with_cache == without


def skip(forward):
    """A forward that returns its input, with the other outputs of the block."""

    def skipped(hidden_states, *args, **kwargs):
        output = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    return skipped


def test_a_shrunk_model_can_be_trained(name):
    model_type = MODEL_TYPES[name]
    dense = model_type.make()
    prune(dense, model_type.kinds)
    small = shrink(dense, verify=False).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in small.parameters()]
    next(iter(small(**model_type.inputs()).values())).square().mean().backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, small.parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2 and all(parameter.isfinite().all() for parameter in small.parameters())


def test_plain_from_pretrained_opens_them_in_a_process_without_hf_sparse(tmp_path):
    folders = {}
    for name, model_type in MODEL_TYPES.items():
        dense = model_type.make()
        prune(dense, model_type.kinds)
        folder = tmp_path / name
        shrink(dense, verify=False).save_pretrained(folder)
        save_file(
            model_type.inputs() | {"expected": first_output(dense, model_type.inputs())},
            folder / "outputs.safetensors",
        )
        folders[str(folder)] = model_type.auto
    program = [sys.executable, "-c", OPEN_PLAIN, json.dumps(folders)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences.keys() == folders.keys() and max(differences.values()) < 1e-5
