"""Callbacks that watch a pruning run from inside, on every rank, and one that spoils it."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback


class Checks(TrainerCallback):
    """Calls `check` once, after the first optimizer step."""

    def __init__(self, check):
        self.check = check

    def on_optimizer_step(self, *args, **kwargs):
        self.check()
        self.check = lambda: None


def is_selected(name: str) -> bool:
    """Whether a parameter is pruned by default: a weight of a linear layer, but not of the head."""
    others = ("embed", "LayerNorm", "layernorm", "norm.", "lm_head", "classifier")
    return name.endswith("weight") and not any(other in name for other in others)


def local(weight: torch.nn.Parameter, rank: int) -> torch.Tensor:
    """What this rank holds of a weight, flat, where the model computes from it."""
    if hasattr(weight, "to_local"):
        return weight.detach().to_local().reshape(-1)
    if hasattr(weight, "ds_tensor"):
        # The last ranks' parts are filled up with numbers that belong to no weight.
        part = weight.ds_tensor.detach().reshape(-1)
        return part[: max(0, weight.ds_numel - rank * part.numel())]
    return weight.detach().reshape(-1)


def master(weight: torch.nn.Parameter, rank: int) -> torch.Tensor | None:
    """The copy that DeepSpeed's optimizer steps on, of the elements of `local`; None where there is none."""
    if hasattr(weight, "ds_tensor"):
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(weight).detach().reshape(-1)[: local(weight, rank).numel()]
    if hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight).detach().reshape(-1)
    return None


class Zeros(TrainerCallback):
    """After every optimizer step, looks at the bits of the weights that this rank holds.

    Writes a row per step: `zeros`, how many are +0.0; `negative`, how many are -0.0; `revived`, how many that had
    been zero are not; `unlike`, how many of the optimizer's copy have other bits, where there is such a copy. Nothing
    but pruning makes a weight zero, so this needs to know nothing about masks.
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
    """Writes the whole weights as they are at the first step, from rank 0."""

    def __init__(self, trainer: Trainer, rank: int, result: dict, path: str):
        self.trainer, self.rank, self.path, self.done = trainer, rank, path, False

    def on_step_begin(self, *args, **kwargs):
        if not self.done:
            from scenario import whole

            weights = whole(self.trainer)
            if self.rank == 0:
                save_file(weights, self.path)
        self.done = True


class Tamper(TrainerCallback):
    """On rank `on`, right before the optimizer step `step`, masks the one weight of a layer that is sure to stay."""

    def __init__(self, trainer: Trainer, rank: int, result: dict, on: int, step: int, name: str):
        self.trainer, self.step, self.name, self.hit = trainer, step, name, rank == on

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.hit and state.global_step + 1 == self.step:
            masks = self.trainer.sparsity_callback.pruner.masks
            mask = masks[self.name].clone()
            mask.view(-1)[dict(model.named_parameters())[self.name].abs().argmax()] = False
            masks.replace(self.name, mask)


SPIES = {"zeros": Zeros, "begin": Begin, "tamper": Tamper}
