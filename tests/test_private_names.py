"""Names of other libraries that the package uses without being documented for that: each must still exist.

A name that one of them renames fails here, before it fails in a run that is distributed, resumed or pushed.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import hf_sparse


PACKAGE = Path(hf_sparse.__file__).parent
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

# Name -> (library, file below it, pattern that must occur in the file).
PRIVATE_NAMES = {
    # Trainer. What we override must also be called, with what we take.
    "_save_rng_state": ("transformers", "trainer.py", r"\bself\._save_rng_state\(output_dir\)"),
    "_push_from_checkpoint": ("transformers", "trainer.py", r"\bself\._push_from_checkpoint\(output_dir\)"),
    "_finish_current_push": ("transformers", "trainer.py", r"def _finish_current_push\(self\)"),
    "push_in_progress": ("transformers", "trainer.py", r"self\.push_in_progress\.jobs\.extend\("),
    "_save": ("transformers", "trainer.py", r"def _save\(self, output_dir: .*, state_dict: "),
    "_internal_call": ("transformers", "trainer.py", r"self\.save_model\(output_dir, _internal_call=True\)"),
    "_VALID_DICT_FIELDS": ("transformers", "training_args.py", r"for \w+ in self\._VALID_DICT_FIELDS:"),
    "_experts_implementation": ("transformers", "configuration_utils.py", r"def _experts_implementation\(self\)"),
    # accelerate
    "_hf_hook": ("accelerate", "hooks.py", r"module\._hf_hook = hook"),
    "weights_map": ("accelerate", "hooks.py", r"self\.weights_map = weights_map"),
    "place_submodules": ("accelerate", "hooks.py", r"self\.place_submodules = place_submodules"),
    "execution_device": ("accelerate", "hooks.py", r"self\.execution_device = execution_device"),
    "prefix": ("accelerate", "utils/offload.py", r"self\.prefix = prefix"),
    "dataset": ("accelerate", "utils/offload.py", r"self\.dataset = dataset"),
    "save_folder": ("accelerate", "utils/offload.py", r"self\.save_folder = "),
    "DeepSpeedOptimizerWrapper": ("accelerate", "utils/deepspeed.py", r"class DeepSpeedOptimizerWrapper\b"),
    # DeepSpeed
    "_hp_mapping": ("deepspeed", "utils/mixed_precision_linkage.py", r"\._hp_mapping = get_hp_fragment_mapping\("),
    "lp_fragment_address": ("deepspeed", "utils/tensor_fragment.py", r"\blp_fragment_address: "),
    "hp_fragment": ("deepspeed", "utils/tensor_fragment.py", r"\bhp_fragment: "),
    "_z3_optimizer": ("deepspeed", "runtime/zero/stage3.py", r"\._z3_optimizer = self\b"),
    "fp32_partitioned_groups_flat": (
        "deepspeed",
        "runtime/zero/stage3.py",
        r"self\.fp32_partitioned_groups_flat\b.* = \[\]",
    ),
    "grad_position": ("deepspeed", "runtime/zero/stage3.py", r"self\.grad_position\[self\.get_param_id\("),
    "get_param_id": ("deepspeed", "runtime/zero/stage3.py", r"def get_param_id\(self, param\)"),
    "ds_id": ("deepspeed", "runtime/zero/partition_parameters.py", r"\bparam\.ds_id = "),
    "ds_tensor": ("deepspeed", "runtime/zero/partition_parameters.py", r"\bparam\.ds_tensor = "),
    "ds_persist": ("deepspeed", "runtime/zero/partition_parameters.py", r"\bparam\.ds_persist = "),
    "ds_process_group": ("deepspeed", "runtime/zero/partition_parameters.py", r"\bparam\.ds_process_group = "),
    # torch
    "_is_flat_param": ("torch", "distributed/fsdp/_flat_param.py", r"\._is_flat_param = True"),
    "_fsdp_flattened": ("torch", "distributed/fsdp/_common_utils.py", r'FSDP_FLATTENED = "_fsdp_flattened"'),
    "_parameters": ("torch", "nn/modules/module.py", r"\b_parameters: dict\[str, "),
    "_pytree": ("torch", "utils/_pytree.py", r"def tree_map\("),
    "_cslt_sparse_mm": ("torch", "_C/_VariableFunctions.pyi", r"def _cslt_sparse_mm\("),
    "_cslt_sparse_mm_search": ("torch", "_C/_VariableFunctions.pyi", r"def _cslt_sparse_mm_search\("),
    "_version": ("torch", "_C/__init__.pyi", r"\b_version: (_int|int)\b"),
}


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_private_name_still_exists(name):
    library, file, pattern = PRIVATE_NAMES[name]
    spec = importlib.util.find_spec(library)  # without importing it
    if spec is None:
        pytest.skip(f"{library} is not installed")
    path = Path(spec.submodule_search_locations[0]) / file
    assert re.search(pattern, path.read_text()), f"{library}/{file} has changed: see how {name} is used"


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
