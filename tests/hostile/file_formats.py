"""Every file that the package reads, once: how a valid one is written, how it is read, which errors may come.

A new file format joins the hostile tests by an entry in `FORMATS`. `tests/hostile/test_files.py` checks that each
file name in `hf_sparse/files.py` has one, or is in `NEVER_READ`.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.sparse import tuned
from helpers.tiny import make
from mutations import mutate_bytes, mutate_json_file, mutate_readme, mutate_recipe, mutate_tensor_file
from safetensors.torch import save_file
from transformers import BertForSequenceClassification, TrainerState

from hf_sparse import OneshotConfig, PruningConfig, PruningConfigError, SparsityReport
from hf_sparse.engine.pruner import Pruner
from hf_sparse.engine.resolve import resolve_layers
from hf_sparse.files import DENSE_RESULTS_FILE, DISTILLATION_FILE, STATE_FILE, TUNING_FILE
from hf_sparse.hub.card import SparsityCard, render_card, rewrite_card, write_card
from hf_sparse.inspection import InspectionError, inspect_checkpoint
from hf_sparse.oneshot.resume import FinishedSubgraphs, ResumeError
from hf_sparse.oneshot.run import read_dense_metrics
from hf_sparse.reporting.report import LayerReport
from hf_sparse.structured.plan import ShrinkPlan, SizeChange
from hf_sparse.training.algorithm_run import AlgorithmRun
from hf_sparse.training.checkpoint_search import find_checkpoint_error, newest_complete_checkpoint
from hf_sparse.training.distillation.state_file import DistillationState
from hf_sparse.training.resume import CheckpointError, ResumeState
from hf_sparse.training.rewinding import Rewinding
from hf_sparse.training.state_files import checksum
from hf_sparse.training.tuning.masked_lora import MaskedLora
from hf_sparse.training.tuning.tuner import Tuner


@dataclass(frozen=True)
class FileFormat:
    """A file that the package reads.

    Args:
        name: of the test.
        constants: names in `hf_sparse/files.py` of the files that this covers.
        write: writes a valid file, and what belongs to it, into a folder and returns its path.
        read: reads the file as the package does.
        mutate: damages its bytes, the same way for the same random state.
        errors: what `read` may raise. The text must have the name of the file.
    """

    name: str
    constants: tuple[str, ...]
    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    mutate: Callable[[bytes, random.Random], bytes]
    errors: tuple[type[Exception], ...]


GROUPS = {
    "attention": {"targets": ["*.query", "*.key"], "pattern": "2:4"},
    "ffn": {"targets": ["*.dense"], "criterion": "snip_momentum", "criterion_kwargs": {"decay": 0.5}},
}
TRAINING = {"target_sparsity": 0.5, "prune_start": 0.1, "prune_every": 2, "exclude": ["*.pooler*"], "groups": GROUPS}
ONESHOT = {
    "solver": "sparsegpt",
    "solver_kwargs": {"dampening": 0.1},
    "layer_sparsity": {"*.query": 0.5, "*.key": 0.4},
}


def text_writer(name: str, values: dict) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return path

    return write


def write_model(folder: Path) -> Path:
    """A pruned model of one layer with all files that pruning writes beside it."""
    weight = torch.ones(4, 4)
    weight[:, :2] = 0
    save_file({"a.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    report = SparsityReport((LayerReport("a.weight", "weights", "unstructured", (4, 4), 16, 8),), 16, 8, 0.5)
    change = SizeChange("intermediate_size", 8, 4, "4 of 8 neurons are zero")
    shrunk = ShrinkPlan(
        "BertModel", (change,), ("1 head: it must stay",), {"layer": (0, 1)}, (32, 16), (128, 64), True
    )
    row = {"runtime": "torch", "batch_size": 1, "median": 0.5, "ratio": 0.5, "low": 0.4, "high": 0.6, "reference": 1.0}
    latency = {"reference": "dense", "length": 128, "clock": "wall time", "rows": [row]}
    config = PruningConfig(target_sparsity=0.5).to_dict()
    write_card(folder, SparsityCard("my-model", report, config, shrunk=shrunk, latency=latency))
    return folder


def model_file(name: str) -> Callable[[Path], Path]:
    return lambda folder: write_model(folder) / name


def write_index(folder: Path) -> Path:
    for number in (1, 2):
        save_file({f"{number}.weight": torch.eye(4)}, folder / f"model-{number}.safetensors", {"format": "pt"})
    weight_map = {f"{number}.weight": f"model-{number}.safetensors" for number in (1, 2)}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 128}, "weight_map": weight_map}))
    return path


def write_finished_subgraph(folder: Path) -> Path:
    FinishedSubgraphs(folder, "1f2e").write(0, {"a.weight": torch.eye(4)}, {"a.weight": 0.25})
    (path,) = folder.iterdir()
    return path


def read_finished_subgraph(path: Path) -> None:
    weights, errors = FinishedSubgraphs(path.parent, "1f2e").read(0)
    assert all(torch.is_tensor(weights[name]) for name in weights)
    assert all(isinstance(error, float) for error in errors.values())


def write_dense_results(folder: Path) -> Path:
    return text_writer(DENSE_RESULTS_FILE, {"asked": {"length": 8}, "metrics": {"perplexity": 3.5}})(folder)


def read_dense_results(path: Path) -> None:
    metrics = read_dense_metrics(path, {"length": 8})
    assert metrics is None or all(isinstance(value, (int, float)) for value in metrics.values())


_scratch = tempfile.TemporaryDirectory(prefix="hf_sparse_hostile_")


# With a checkpoint before the prune step and one after it.
RUN = {"target_sparsity": 0.5, "criterion": "greedy_movement", "prune_start": 2, "prune_end": 2, "max_steps": 3}


@functools.cache
def trained() -> Path:
    """The folder of a run with the checkpoints of steps 2 and 3, the first of which prunes."""
    folder = Path(_scratch.name)
    make(folder, **RUN, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    return folder


# The checkpoint of step 3 has the weights of step 1, which are restored at step 4.
REWINDS = RUN | {"prune_end": 4, "max_steps": 5, "rewind": 1}


def write_rewinding_state(folder: Path) -> Path:
    make(folder, **REWINDS, save_strategy="steps", save_steps=3).train()
    return folder / "checkpoint-3" / STATE_FILE


def checkpoint_file(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        shutil.copytree(trained(), folder / "run")
        return folder / "run" / "checkpoint-3" / name

    return write


def write_index_of_checkpoint(folder: Path) -> Path:
    path = checkpoint_file("model.safetensors.index.json")(folder)
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    return path


def seal(tensors: dict[str, torch.Tensor], values: dict) -> None:
    values.pop("checksum", None)
    values["checksum"] = checksum(tensors, values)


def read_state(path: Path, options: dict = RUN) -> None:
    """As a run that resumes: is the checkpoint whole, does the state fit, and does the pruner take it?"""
    state = ResumeState(path.parent)
    if problem := find_checkpoint_error(state):
        raise CheckpointError(f"{path}: {problem}")
    model, config = BertForSequenceClassification.from_pretrained(path.parent), PruningConfig(**pruning(options))
    pruner, schedule = Pruner(model, config), config.schedule(options["max_steps"])
    rewinding = None if schedule.rewind is None else Rewinding(pruner, schedule, None)
    state.validate(pruner.groups, config, schedule, step=3)
    state.apply(pruner, AlgorithmRun(pruner, schedule, None, 0), rewinding)


def pruning(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "max_steps"}


def find_checkpoint(path: Path) -> None:
    """As a run that resumes from the newest checkpoint: a damaged one is skipped, whatever is damaged."""
    found = newest_complete_checkpoint(path.parent.parent).checkpoint
    assert found == path.parent or found.name == "checkpoint-2"
    if found == path.parent:
        TrainerState.load_from_json(str(found / "trainer_state.json"))
        torch.load(found / "optimizer.pt", weights_only=True)
        torch.load(found / "scheduler.pt", weights_only=True)


@functools.cache
def tuned_run() -> Path:
    """The folder of a run with `tune`."""
    folder = Path(_scratch.name) / "tuned"
    tuned(folder, tune="masked_lora", max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder


def write_tuning(folder: Path) -> Path:
    shutil.copytree(tuned_run(), folder / "run")
    return folder / "run" / "checkpoint-2" / TUNING_FILE


def read_tuning(path: Path) -> None:
    """As a run that resumes: does the state fit, and does the tuner take it?"""
    state, config = ResumeState(path.parent), PruningConfig(keep_zeros=True)
    model = BertForSequenceClassification.from_pretrained(path.parent)
    groups, _ = resolve_layers(model, config)
    state.validate(groups, config, step=2, tuning=MaskedLora())
    tuner = Tuner(MaskedLora(), groups[0].layers, seed=0)
    tuner.prepare(model)
    state.start_tuner(tuner)
    tuner.write()


DISTILLATION = {"version": 1, "teacher": "dense", "distill_alpha": 0.9, "distill_temperature": 2.0, "checksum": 7}
DISTILLATION |= {"distill_hidden": 0.0, "distill_teacher_dtype": None}


def read_distillation(path: Path) -> None:
    """As a run that resumes with the same teacher, which others may find to be another one."""
    state = DistillationState(PruningConfig(distill_teacher="dense"), torch.nn.Linear(1, 1))
    state.checksum = 7
    state.compare(path.parent)


FORMATS = (
    FileFormat(
        "recipe_yaml",
        (),
        text_writer("recipe.yaml", TRAINING),
        lambda path: PruningConfig.from_file(path).resolve_groups(),
        mutate_recipe,
        (PruningConfigError,),
    ),
    FileFormat(
        "recipe_json",
        (),
        text_writer("pruning_config.json", ONESHOT),
        lambda path: OneshotConfig.from_file(path).resolve_groups(),
        mutate_json_file,
        (PruningConfigError,),
    ),
    FileFormat(
        "report",
        ("REPORT_FILE",),
        model_file("pruning_report.json"),
        lambda path: str(SparsityReport.load(path)),
        mutate_json_file,
        (ValueError,),
    ),
    FileFormat(
        "config",
        ("CONFIG_FILE",),
        model_file("pruning_config.json"),
        lambda path: str(render_card(SparsityCard.load(path.parent))),
        mutate_json_file,
        (ValueError,),
    ),
    FileFormat(
        "card",
        ("CARD_FILE",),
        model_file("pruning_card.json"),
        lambda path: str(render_card(SparsityCard.load(path.parent))),
        mutate_json_file,
        (ValueError,),
    ),
    FileFormat(
        "shrink",
        ("SHRINK_FILE",),
        model_file("pruning_shrink.json"),
        lambda path: str(render_card(SparsityCard.load(path.parent))),
        mutate_json_file,
        (ValueError,),
    ),
    FileFormat(
        "readme",
        ("README_FILE",),
        model_file("README.md"),
        lambda path: rewrite_card(path.parent),
        mutate_readme,
        (ValueError,),
    ),
    FileFormat(
        "weights",
        (),
        model_file("model.safetensors"),
        lambda path: str(inspect_checkpoint(path.parent)),
        mutate_tensor_file(),
        (InspectionError,),
    ),
    FileFormat(
        "index",
        (),
        write_index,
        lambda path: str(inspect_checkpoint(path.parent)),
        mutate_json_file,
        (InspectionError,),
    ),
    FileFormat(
        "state",
        ("STATE_FILE", "STATE_SHARD_PATTERN"),
        checkpoint_file(STATE_FILE),
        read_state,
        mutate_tensor_file("hf_sparse", seal),
        (CheckpointError,),
    ),
    FileFormat(
        "rewinding_state",
        (),
        write_rewinding_state,
        functools.partial(read_state, options=REWINDS),
        mutate_tensor_file("hf_sparse", seal),
        (CheckpointError,),
    ),
    FileFormat(
        "tuning",
        ("TUNING_FILE",),
        write_tuning,
        read_tuning,
        mutate_tensor_file("hf_sparse", seal),
        (CheckpointError,),
    ),
    FileFormat(
        "distillation",
        ("DISTILLATION_FILE",),
        text_writer(DISTILLATION_FILE, DISTILLATION),
        read_distillation,
        mutate_json_file,
        (CheckpointError,),
    ),
    FileFormat(
        "found_state", (), checkpoint_file(STATE_FILE), find_checkpoint, mutate_tensor_file("hf_sparse", seal), ()
    ),
    FileFormat("found_weights", (), checkpoint_file("model.safetensors"), find_checkpoint, mutate_tensor_file(), ()),
    FileFormat("found_index", (), write_index_of_checkpoint, find_checkpoint, mutate_json_file, ()),
    FileFormat("found_config", (), checkpoint_file("config.json"), find_checkpoint, mutate_json_file, ()),
    FileFormat("trainer_state", (), checkpoint_file("trainer_state.json"), find_checkpoint, mutate_json_file, ()),
    FileFormat("optimizer", (), checkpoint_file("optimizer.pt"), find_checkpoint, mutate_bytes, ()),
    FileFormat("lr_scheduler", (), checkpoint_file("scheduler.pt"), find_checkpoint, mutate_bytes, ()),
    FileFormat(
        "dense_results", ("DENSE_RESULTS_FILE",), write_dense_results, read_dense_results, mutate_json_file, ()
    ),
    FileFormat(
        "finished_subgraph",
        ("FINISHED_BLOCK_GLOB",),
        write_finished_subgraph,
        read_finished_subgraph,
        mutate_tensor_file("hf_sparse"),
        (ResumeError,),
    ),
)

NEVER_READ = {
    "ONESHOT_RESULTS_FILE": "written for people",
    "SCHEDULE_PLOT_FILE": "an image",
    "LAYERS_PLOT_FILE": "an image",
    "TEMPORARY_GLOB": "deleted",
    "STATE_GLOB": "finds the files of STATE_FILE and STATE_SHARD_PATTERN",
}
