"""Callbacks that record the weights during a run on every rank, and one that corrupts a mask."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from hf_sparse import PruningConfig, SparsityCallback
from hf_sparse.distributed import build_shards, optimizer_state


class Checks(TrainerCallback):
    """Calls `check` once, after the first optimizer step."""

    def __init__(self, check):
        self.check = check

    def on_optimizer_step(self, *args, **kwargs):
        self.check()
        self.check = lambda: None


def is_selected(name: str) -> bool:
    """Whether a parameter is pruned by default: a weight of a linear layer, but not of the head or a pooler."""
    others = ("embed", "LayerNorm", "layernorm", "norm.", "lm_head", "classifier", "pooler")
    return name.endswith("weight") and not any(other in name for other in others)


def local(weight: torch.nn.Parameter, rank: int) -> torch.Tensor:
    """Returns this rank's part of the model's weight, flattened."""
    if hasattr(weight, "to_local"):
        return weight.detach().to_local().reshape(-1)
    if hasattr(weight, "ds_tensor"):
        # The last ranks' parts end with padding.
        part = weight.ds_tensor.detach().reshape(-1)
        return part[: max(0, weight.ds_numel - rank * part.numel())]
    return weight.detach().reshape(-1)


def master(weight: torch.nn.Parameter, rank: int) -> torch.Tensor | None:
    """Returns DeepSpeed's master weight of the elements of `local`; None without DeepSpeed."""
    if hasattr(weight, "ds_tensor"):
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(weight).detach().reshape(-1)[: local(weight, rank).numel()]
    if hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight).detach().reshape(-1)
    return None


class Zeros(TrainerCallback):
    """After every optimizer step, counts zeros among the weights that this rank holds.

    Appends a row per step: `zeros`, the number of +0.0; `negative`, of -0.0; `revived`, of weights that were zero
    before and are not; `unlike`, of master weights with other bits than the model's; `copies`, of weights with a
    master. Masks are not read: nothing but pruning makes a weight zero.
    """

    def __init__(self, trainer: Trainer, rank: int, result: dict):
        self.rank, self.rows, self.before = rank, result.setdefault("zeros", []), {}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        row = {"step": state.global_step + 1, "zeros": 0, "negative": 0, "revived": 0, "unlike": 0, "copies": 0}
        for name, weight in model.named_parameters():
            if not is_selected(name):
                continue
            bits = local(weight, self.rank).view(torch.int32).clone()
            zero = bits == 0
            row["zeros"] += int(zero.sum())
            row["negative"] += int((bits == torch.iinfo(torch.int32).min).sum())
            if name in self.before:
                row["revived"] += int((self.before[name] & ~zero).sum())
            self.before[name] = zero
            copy = master(weight, self.rank)
            if copy is not None:
                row["copies"] += 1
                row["unlike"] += int((copy.contiguous().view(torch.int32) != bits).sum())
        self.rows.append(row)


class Begin(TrainerCallback):
    """Saves the full weights at the start of the first step, from rank 0."""

    def __init__(self, trainer: Trainer, rank: int, result: dict, path: str):
        self.trainer, self.rank, self.path, self.done = trainer, rank, path, False

    def on_step_begin(self, *args, **kwargs):
        if not self.done:
            from scenario import gather_weights

            weights = gather_weights(self.trainer)
            if self.rank == 0:
                save_file(weights, self.path)
        self.done = True


class Tamper(TrainerCallback):
    """On rank `on`, before optimizer step `step`, masks the largest weight of a layer, which pruning would keep."""

    def __init__(self, trainer: Trainer, rank: int, result: dict, on: int, step: int, name: str):
        self.trainer, self.step, self.name, self.hit = trainer, step, name, rank == on

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.hit and state.global_step + 1 == self.step:
            masks = self.trainer.sparsity_callback.pruner.masks
            mask = masks[self.name].clone()
            mask.view(-1)[dict(model.named_parameters())[self.name].abs().argmax()] = False
            masks.replace(self.name, mask)


class Revive(TrainerCallback):
    """Changes all selected weights that this rank holds when a step ends or training ends, as averaging callbacks
    do."""

    def __init__(self, trainer: Trainer, rank: int, result: dict, step: int):
        self.rank, self.step = rank, step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            for name, weight in model.named_parameters():
                if is_selected(name):
                    local(weight, self.rank).add_(1.0)

    on_train_end = on_step_end


class OptimizerState(TrainerCallback):
    """After optimizer step `step`, saves the optimizer's state of each selected weight, as far as this rank holds it,
    as `<name>|<key>|<regions>`, then sets it to zero; after the next step, saves it again."""

    def __init__(self, trainer: Trainer, rank: int, result: dict, step: int, folder: str):
        self.trainer, self.rank, self.step, self.folder = trainer, rank, step, folder

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        done = state.global_step + 1
        if done not in (self.step, self.step + 1):
            return
        selected = {name: weight for name, weight in model.named_parameters() if is_selected(name)}
        shards, _ = build_shards(selected)
        found = {}
        for name, tensors in optimizer_state(optimizer, shards).items():
            regions = [[region.start, region.stop] for region in shards[name].local_regions]
            for key, tensor in tensors.items():
                assert tensor.shape == shards[name].tensor.shape, (name, key)
                found[f"{name}|{key}|{json.dumps(regions)}"] = tensor.reshape(-1).clone()
                if done == self.step:
                    tensor.zero_()
        save_file(found, f"{self.folder}/state-{done}-{self.rank}.safetensors")


def prune(trainer: Trainer, rank: int, result: dict, **config) -> SparsityCallback:
    """Adds pruning to a stock trainer."""
    return SparsityCallback(PruningConfig(**config))


SPIES = {"zeros": Zeros, "begin": Begin, "tamper": Tamper, "revive": Revive, "prune": prune, "state": OptimizerState}
