"""Names of other libraries that the package uses although they are not documented: why, and what else there is.

A name that one of them renames fails here, before it fails in a run that is distributed, resumed or pushed.
"""

import ast
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

import hf_sparse


PACKAGE = Path(hf_sparse.__file__).parent
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


class Private(NamedTuple):
    """A name that its library does not document, and may change in any release.

    Args:
        library: that defines it.
        file: below the library's folder.
        pattern: regular expression that must occur in the file for our use to be right.
        reason: why we need it.
        without: what we would do without it.
    """

    library: str
    file: str
    pattern: str
    reason: str
    without: str


TRAINER, CONFIGS = ("transformers", "trainer.py"), ("transformers", "configuration_utils.py")
HOOKS, OFFLOAD = ("accelerate", "hooks.py"), ("accelerate", "utils/offload.py")
ZERO3, PARTITION = ("deepspeed", "runtime/zero/stage3.py"), ("deepspeed", "runtime/zero/partition_parameters.py")
FRAGMENT = ("deepspeed", "utils/tensor_fragment.py")
# The reasons and plans that several names share.
STORE = "zeros must reach the CPU or disk copy from which accelerate loads a weight, and it has no function for that"
NO_OFFLOAD = "refuse to prune offloaded models, as `onload` does where no hook brings the weights"
MASTER = "zeros must reach the fp32 master, and the public functions of DeepSpeed return copies of it"
NO_MASTER = "refuse ZeRO-3 (stage 2 remains), as `check_storage` does where the master is not found"
NO_FRAGMENT = "refuse ZeRO-1 and 2, or set whole weights by safe_set_full_fp32_param, one at a time"
SHARD = "says which entries of a weight this rank holds"
SPARSE = "times the 2:4 kernels of cuSPARSELt on packed weights, which the public tensor class hides"
NO_SPARSE = "use torch.sparse.to_sparse_semi_structured alone, with its slower choice of kernel"
TREES = "flattens inputs and outputs of blocks, of any nesting, as torch.export and transformers' caches do"
CLASS = "ask users for the layout: the class has no attribute that tells it"

PRIVATE_NAMES = {
    # Trainer. What we override must also be called, with what we take.
    "_save_rng_state": Private(
        *TRAINER,
        r"\bself\._save_rng_state\(output_dir\)",
        "overridden: all ranks wait before trainer_state.json, which marks a checkpoint as complete",
        "`train` warns that a checkpoint may count as complete too early; the barrier would move to `on_save`",
    ),
    "_push_from_checkpoint": Private(
        *TRAINER,
        r"\bself\._push_from_checkpoint\(output_dir\)",
        "called after training for a checkpoint whose upload was left out or failed",
        "`finish_pushes` logs that the last checkpoint is not on the Hub, and the command that uploads it",
    ),
    "push_in_progress": Private(
        *TRAINER,
        r"self\.push_in_progress\.jobs\.extend\(",
        "has the futures of background uploads, whose failures Trainer never reads",
        "`UploadWatcher` warns that failures cannot be seen; the repository would be compared after training",
    ),
    "_internal_call": Private(
        *TRAINER,
        r"self\.save_model\(output_dir, _internal_call=True\)",
        "the second parameter of the public `save_model`, which marks the saves of checkpoints",
        "recognize checkpoints by the names of their folders",
    ),
    "_experts_implementation": Private(
        *CONFIGS,
        r"def _experts_implementation\(self\)",
        "says how fused experts are computed, to restore it; only where get_experts_implementation is missing",
        "it goes when the oldest supported transformers has get_experts_implementation (5.6 has not)",
    ),
    # accelerate
    "_hf_hook": Private(*HOOKS, r"module\._hf_hook = hook", STORE, NO_OFFLOAD),
    "weights_map": Private(*HOOKS, r"self\.weights_map = weights_map", STORE, NO_OFFLOAD),
    "place_submodules": Private(*HOOKS, r"self\.place_submodules = place_submodules", STORE, NO_OFFLOAD),
    "execution_device": Private(
        *HOOKS,
        r"self\.execution_device = execution_device",
        "says where the inputs of an offloaded model must be",
        "take the first accelerator",
    ),
    "prefix": Private(*OFFLOAD, r"self\.prefix = prefix", STORE, NO_OFFLOAD),
    "dataset": Private(*OFFLOAD, r"self\.dataset = dataset", STORE, NO_OFFLOAD),
    "save_folder": Private(*OFFLOAD, r"self\.save_folder = ", STORE, NO_OFFLOAD),
    # DeepSpeed
    "_hp_mapping": Private(
        "deepspeed",
        "utils/mixed_precision_linkage.py",
        r"\._hp_mapping = get_hp_fragment_mapping\(",
        MASTER,
        NO_FRAGMENT,
    ),
    "lp_fragment_address": Private(*FRAGMENT, r"\blp_fragment_address: ", SHARD, NO_FRAGMENT),
    "hp_fragment": Private(*FRAGMENT, r"\bhp_fragment: ", MASTER, NO_FRAGMENT),
    "_z3_optimizer": Private(*ZERO3, r"\._z3_optimizer = self\b", MASTER, NO_MASTER),
    "fp32_partitioned_groups_flat": Private(
        *ZERO3, r"self\.fp32_partitioned_groups_flat\b.* = \[\]", MASTER, NO_MASTER
    ),
    "grad_position": Private(*ZERO3, r"self\.grad_position\[self\.get_param_id\(", MASTER, NO_MASTER),
    "get_param_id": Private(*ZERO3, r"def get_param_id\(self, param\)", MASTER, NO_MASTER),
    "ds_id": Private(*PARTITION, r"\bparam\.ds_id = ", "marks the parameters that ZeRO-3 splits", NO_MASTER),
    "ds_tensor": Private(*PARTITION, r"\bparam\.ds_tensor = ", MASTER, NO_MASTER),
    "ds_persist": Private(
        *PARTITION,
        r"\bparam\.ds_persist = ",
        "tells small parameters, which stay whole on every rank and need the zeros there too",
        "set stage3_param_persistence_threshold to 0",
    ),
    "ds_process_group": Private(*PARTITION, r"\bparam\.ds_process_group = ", SHARD, "use the default process group"),
    # torch
    "_fsdp_flattened": Private(
        "torch",
        "distributed/fsdp/_common_utils.py",
        r'FSDP_FLATTENED = "_fsdp_flattened"',
        "tells weights of FSDP version 1, which are refused",
        "read the version in accelerate's fsdp_plugin; torch removes version 1",
    ),
    "_pytree": Private("torch", "utils/_pytree.py", r"def tree_map\(", TREES, "depend on optree"),
    "_cslt_sparse_mm": Private("torch", "_C/_VariableFunctions.pyi", r"def _cslt_sparse_mm\(", SPARSE, NO_SPARSE),
    "_cslt_sparse_mm_search": Private(
        "torch", "_C/_VariableFunctions.pyi", r"def _cslt_sparse_mm_search\(", SPARSE, NO_SPARSE
    ),
    "_version": Private(
        "torch",
        "_C/__init__.pyi",
        r"\b_version: (_int|int)\b",
        "tells whether an input was changed in place since an observer has seen it",
        "observe shared inputs once for each weight, which costs time",
    ),
    # Classes that are known by name: importing their libraries takes seconds, and rooms below `training` must not.
    "Conv1D": Private(
        "transformers", "pytorch_utils.py", r"^class Conv1D\(nn\.Module\)", "its weight is (inputs, outputs)", CLASS
    ),
    "Llama4TextExperts": Private(
        "transformers",
        "models/llama4/modeling_llama4.py",
        r"^class Llama4TextExperts\b",
        "its weights are (experts, inputs, outputs), and it lacks is_transposed",
        CLASS,
    ),
    "GptOssExperts": Private(
        "transformers",
        "models/gpt_oss/modeling_gpt_oss.py",
        r"^class GptOssExperts\b(.|\n)*\[\.\.\., ::2\]",
        "the rows of gate and up alternate in its weights",
        CLASS,
    ),
    "DeepSpeedOptimizerWrapper": Private(
        "accelerate",
        "utils/deepspeed.py",
        r"^class DeepSpeedOptimizerWrapper\b",
        "tells an optimizer that steps inside backward",
        "read accelerator.distributed_type, which the callback of a stock Trainer does not get",
    ),
}


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_private_name_still_exists(name):
    private = PRIVATE_NAMES[name]
    spec = importlib.util.find_spec(private.library)  # without importing it
    if spec is None:
        pytest.skip(f"{private.library} is not installed")
    path = Path(spec.submodule_search_locations[0]) / private.file
    assert path.exists() and re.search(private.pattern, path.read_text(), flags=re.MULTILINE), (
        f"{private.library} {version(private.library)} has changed {private.file}: {name} is not there as we use it. "
        f"We need it because it {private.reason}. Without it: {private.without}."
    )


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_listed_name_is_still_used(name):
    assert any(re.search(rf"\b{name}\b", text) for text in SOURCES.values()), f"take {name} off the list"


def test_every_private_name_that_is_not_ours_is_listed():
    trees = {path: ast.parse(text) for path, text in SOURCES.items()}
    ours = {name for tree in trees.values() for node in ast.walk(tree) for name in defined(node)}
    foreign = {
        f"{name} ({path.relative_to(PACKAGE)}:{node.lineno})"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        for name in used(node)
        if is_private(name) and name not in ours and name not in PRIVATE_NAMES
    }
    assert not foreign, "add them to PRIVATE_NAMES"


def defined(node: ast.AST) -> set[str]:
    """The names that a node of the package's own code defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return {node.attr}
    return {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()


def used(node: ast.AST) -> set[str]:
    """The names that a node reads: as an attribute, by getattr and the like, or by an import."""
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
        return {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    if isinstance(node, ast.Import):
        return {part for alias in node.names for part in alias.name.split(".")}
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return set()


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
