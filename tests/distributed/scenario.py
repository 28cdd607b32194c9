"""One training run on one of several ranks, and what it writes for the tests to look at.

A scenario, as `Ranks.run` takes it:
    mode, world     how and on how many ranks
    output_dir      of the trainer
    trainer         "plain" or "sparse"
    options         of the training arguments
    seed            of the model's first weights
    config          of the model, where other than by default
    raises          whether an error of `train` is a result, written as `error`
    resume          what `train` gets as resume_from_checkpoint
    spies           names in `spies.SPIES`, with what each takes
    kill            a name in `faults.FAULTS`, the step, and the ranks: [name, step, ranks]
    checked         whether the mode is as `modes.check` knows it; true by default
    export          a folder for `save_model`, or nothing
    hub             the address of a `HubServer`, or nothing
    push            whether to upload in the end, with what came of it as `pushed`
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

from hf_sparse import SparseTrainer


BATCH = 4
# gloo gives up on a rank that is silent for so long.
PATIENCE = datetime.timedelta(seconds=60)


class _InOrder:
    """Samples in the order of the dataset, for any number of ranks."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class PlainTrainer(_InOrder, Trainer):
    pass


class SparseInOrder(_InOrder, SparseTrainer):
    pass


def repeated(copies: int, language: bool) -> list[dict]:
    """Batches, each `copies` times in a row: accelerate deals them out in turn, so each rank gets the batches that a
    single process would. Gradients are then the same on all ranks, and their mean is exact for 2 and 4 ranks."""
    rows = samples(24, language)
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return [row for batch in batches for _ in range(copies) for row in batch]


def training_options(options: dict, mode: str) -> dict:
    """Options under which one and several ranks compute the same."""
    exact = {
        "per_device_train_batch_size": BATCH,
        # The norm of sharded gradients is summed in another order.
        "max_grad_norm": 0.0,
        # BERT's loss would be multiplied by the number of ranks, or without this Llama's under TP.
        "average_tokens_across_devices": MODES[mode].model == "llama",
        # The fused optimizer computes the last few numbers of a tensor by other instructions, and parts end elsewhere.
        "optim": "adamw_torch",
    }
    return exact | MODES[mode].arguments | options


def main(scenario: dict, rank: int) -> Trainer:
    """Train, and write `rank-<r>.json` and, on rank 0, the whole weights. Returns what had better live on."""
    torch.set_num_threads(1)
    folder, mode, world = Path(scenario["folder"]), scenario["mode"], scenario["world"]
    if MODES[mode].kind == "NO":
        for variable in [name for name in os.environ if name.endswith(("RANK", "WORLD_SIZE")) or "MASTER_" in name]:
            del os.environ[variable]
    else:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=PATIENCE
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
    data = repeated(world if MODES[mode].data_parallel else 1, MODES[mode].model == "llama")
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
    weights = whole(trainer)
    if rank == 0:
        save_file(weights, Path(scenario["folder"]) / "weights.safetensors")
    if scenario.get("export"):
        trainer.save_model(scenario["export"])
    if scenario.get("push"):
        result["pushed"] = str(trainer.push_to_hub())


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights as one process would hold them, gathered by all ranks."""
    return {name: _whole(weight) for name, weight in trainer.model.named_parameters()}


def _whole(weight: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor().detach().clone()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach().clone()
