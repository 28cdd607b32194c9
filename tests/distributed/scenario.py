"""One training run on one of several ranks, which writes its results to files.

A scenario is a JSON object, the keyword arguments of `Ranks.run`:
    mode, world     training mode and number of ranks
    output_dir      of the trainer
    trainer         "plain" or "sparse"
    options         of the training arguments
    seed            of the model's initial weights
    config          changes to the default model config
    copies          how often each batch of the data is there; default once for each rank that has its own
    pruned          fraction of the model's weights to prune before training
    raises          whether an error of `train` is a result, written as `error`
    resume          resume_from_checkpoint of `train`
    spies           name in `spies.SPIES` -> keyword arguments
    kill            [name in `faults.FAULTS`, step, ranks]
    checked         whether to call `modes.check`; default true
    export          folder for `save_model`
    hub             address of a `HubServer`
    push            whether to call `push_to_hub` after training; its result is written as `pushed`
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import torch
from faults import FAULTS
from helpers.hub_server import speak_to
from helpers.modes import MODES, as_on_gpus, build, check
from helpers.tiny import arguments, figures, samples
from safetensors.torch import save_file
from spies import SPIES, Checks
from torch.utils.data import SequentialSampler
from transformers import Trainer

from hf_sparse import Pruner, PruningConfig, SparseTrainer
from hf_sparse.training.state_files import checksum


BATCH = 4
# Timeout of collectives.
TIMEOUT = datetime.timedelta(seconds=60)


class _InOrder:
    """Samples in dataset order, for any number of ranks."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class PlainTrainer(_InOrder, Trainer):
    pass


class SparseInOrder(_InOrder, SparseTrainer):
    pass


def repeated(copies: int, language: bool) -> list[dict]:
    """Repeats each batch `copies` times, so that every rank gets the batches that a single process would: accelerate
    assigns batches to ranks in turn. Gradients are then equal on all ranks, and their mean is exact for 2 and 4."""
    rows = samples(24, language)
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return [row for batch in batches for _ in range(copies) for row in batch]


def training_options(options: dict, mode: str) -> dict:
    """Adds the options under which one and several ranks compute the same."""
    exact = {
        "per_device_train_batch_size": BATCH,
        # The order of summation in the norm of gradients depends on the shards.
        "max_grad_norm": 0.0,
        # True multiplies the loss of BERT by the number of ranks, False that of Llama under TP.
        "average_tokens_across_devices": MODES[mode].model == "llama",
        # The fused optimizer rounds the last entries of a tensor differently, and shards end at other entries.
        "optim": "adamw_torch",
    }
    return exact | MODES[mode].arguments | options


def main(scenario: dict, rank: int) -> Trainer:
    """Trains and writes `rank-<r>.json` and, on rank 0, the full weights. Returns the trainer, to keep it alive."""
    torch.set_num_threads(1)
    folder, mode, world = Path(scenario["folder"]), scenario["mode"], scenario["world"]
    if MODES[mode].kind == "NO":
        for variable in [name for name in os.environ if name.endswith(("RANK", "WORLD_SIZE")) or "MASTER_" in name]:
            del os.environ[variable]
    else:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=TIMEOUT
        )
    if scenario.get("hub"):
        speak_to(scenario["hub"])
    result = {}
    with as_on_gpus(mode):
        trainer = _trainer(scenario, rank, result)
        try:
            trainer.train(resume_from_checkpoint=scenario.get("resume"))
        except Exception as error:
            if not scenario.get("raises"):
                raise
            result["error"] = f"{type(error).__name__}: {error}"
        else:
            _finish(scenario, trainer, rank, result)
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    return trainer


def _trainer(scenario: dict, rank: int, result: dict) -> Trainer:
    folder, mode, world = Path(scenario["folder"]), scenario["mode"], scenario["world"]
    options = training_options(scenario.get("options", {}), mode)
    args = arguments(scenario.get("output_dir", folder / "out"), **options)
    model = build(mode, scenario.get("seed", 0), world, folder / "dense", **scenario.get("config", {}))
    if scenario.get("pruned"):
        Pruner(model, PruningConfig(target_sparsity=scenario["pruned"], criterion="magnitude")).update(1, 1)
    copies = scenario.get("copies", world if MODES[mode].data_parallel else 1)
    data = repeated(copies, MODES[mode].model == "llama")
    cls = PlainTrainer if scenario.get("trainer") == "plain" else SparseInOrder
    trainer = cls(model, args, train_dataset=data)
    if scenario.get("checked", True):
        trainer.add_callback(Checks(lambda: check(mode, trainer, world)))
    for name, given in scenario.get("spies", {}).items():
        trainer.add_callback(SPIES[name](trainer, rank, result, **given))
    kill, step, ranks = scenario.get("kill", (None, None, ()))
    if rank in ranks:
        FAULTS[kill](step, trainer)
    return trainer


def _finish(scenario: dict, trainer: Trainer, rank: int, result: dict) -> None:
    result |= {"log": figures(trainer.state.log_history), "step": trainer.state.global_step}
    if isinstance(trainer, SparseTrainer):
        result["from"] = Path(trainer.resumed_from or "").name
    weights = gather_weights(trainer)
    result["digest"] = checksum(weights, {})
    if rank == 0:
        save_file(weights, Path(scenario["folder"]) / "weights.safetensors")
    if scenario.get("export"):
        trainer.save_model(scenario["export"])
    if scenario.get("push"):
        result["pushed"] = str(trainer.push_to_hub())


def gather_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns the full weights, gathered from all ranks."""
    return {name: _gather(weight) for name, weight in trainer.model.named_parameters()}


def _gather(weight: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor().detach().clone()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach().clone()
