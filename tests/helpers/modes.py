"""The distributed training modes of the tests: how to configure each, and how to check that it is active.

No GPUs are needed: all modes run on CPU with gloo. Misconfigured, several of them silently fall back to DDP or to one
process, so every run checks its mode.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from .tiny import bert


def llama(seed: int = 0, **config) -> LlamaForCausalLM:
    """1 layer with untied embeddings: 7 weights, 8,704 in all, that divide by 4 ranks. Has plans for FSDP2 and TP."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes | config))


def deterministic_bert(seed: int = 0, **config) -> torch.nn.Module:
    """Without dropout, which differs between ranks. Its 44 rows make 11 blocks of 4: two ranks split one of them."""
    fixed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 44}
    return bert(seed, **fixed | config)


MODELS = {"bert": deterministic_bert, "llama": llama}


def _fsdp(state_dict_type: str) -> dict:
    config = {"version": 2, "transformer_layer_cls_to_wrap": "BertLayer", "state_dict_type": state_dict_type}
    return {"fsdp": True, "fsdp_config": config}


def _zero(stage: int) -> dict:
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    if stage == 3:
        # Weights of fewer elements stay whole on every rank by default, that is all of a tiny model.
        config["zero_optimization"] |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        }
    return {"deepspeed": config}


@dataclass(frozen=True)
class Mode:
    """One training mode.

    Args:
        arguments: of `TrainingArguments`.
        model: a key of `MODELS`.
        load: the field of `DistributedConfig` to pass to `from_pretrained`, if weights are sharded when loaded.
        gpu: whether accelerate supports it on GPUs only; see `as_on_gpus`.
        kind: accelerate's distributed type, which is checked.
        sharded: whether a weight is a DTensor.
        data_parallel: whether ranks see different samples.
        exact_as: the mode that computes the same on one rank, bit for bit; None where rounding depends on the
            number of ranks.
        checkpoints: whether Trainer can write checkpoints to resume from.
        elastic: whether Trainer can resume on another number of ranks.
    """

    arguments: dict = field(default_factory=dict)
    model: str = "bert"
    load: str | None = None
    gpu: bool = False
    kind: str = "MULTI_CPU"
    sharded: bool = False
    data_parallel: bool = True
    exact_as: str | None = "single"
    checkpoints: bool = True
    elastic: bool = True


# A model that is sharded as it loads cannot resume: transformers refuses to write checkpoints with an optimizer.
# DeepSpeed cannot resume on another number of ranks.
MODES = {
    "single": Mode(kind="NO"),
    "single_llama": Mode(kind="NO", model="llama"),
    "ddp": Mode(),
    "fsdp2": Mode(_fsdp("FULL_STATE_DICT"), gpu=True, kind="FSDP", sharded=True),
    # Trainer saves sharded checkpoints of torch, for `accelerate merge-weights`.
    "fsdp2_sharded": Mode(_fsdp("SHARDED_STATE_DICT"), gpu=True, kind="FSDP", sharded=True),
    "fsdp_size": Mode(
        model="llama", load="fsdp_size", sharded=True, exact_as="single_llama", checkpoints=False, elastic=False
    ),
    # Partial products of a row are summed over ranks, which rounds differently than one process.
    "tp": Mode(
        model="llama",
        load="tp_size",
        gpu=True,
        kind="MULTI_GPU",
        sharded=True,
        data_parallel=False,
        exact_as=None,
        checkpoints=False,
        elastic=False,
    ),
    "zero1": Mode(_zero(1), kind="DEEPSPEED", elastic=False),
    "zero2": Mode(_zero(2), kind="DEEPSPEED", elastic=False),
    # Its autograd hooks change the order in which gradients of shared activations are added.
    "zero3": Mode(_zero(3), kind="DEEPSPEED", exact_as="zero3", elastic=False),
}


def available(mode: str) -> bool:
    """Whether the packages for the mode are installed."""
    return MODES[mode].kind != "DEEPSPEED" or importlib.util.find_spec("deepspeed") is not None


def mode_params(*names: str, **traits) -> list:
    """Returns pytest parameters: the named modes, or all modes on several ranks, that have these traits."""
    chosen = names or (name for name, mode in MODES.items() if mode.kind != "NO")
    return [
        pytest.param(name, marks=pytest.mark.skipif(not available(name), reason="deepspeed is not installed"), id=name)
        for name in chosen
        if all(getattr(MODES[name], trait) == value for trait, value in traits.items())
    ]


def build(mode: str, seed: int, world: int, folder: Path, **config) -> torch.nn.Module:
    """Returns the model of a mode, sharded where `from_pretrained` does that. Weights depend on the seed only.

    Args:
        folder: for a checkpoint to load from, which rank 0 writes.
    """
    load, make = MODES[mode].load, MODELS[MODES[mode].model]
    if load is None or world == 1:
        return make(seed, **config)
    from transformers.distributed import DistributedConfig

    if torch.distributed.get_rank() == 0:
        make(seed, **config).save_pretrained(folder)
    torch.distributed.barrier()
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{load: world}))


@contextlib.contextmanager
def as_on_gpus(mode: str):
    """Makes accelerate use FSDP2 or TP on CPU ranks, where it would silently use DDP."""
    create = Trainer.create_accelerator_and_postprocess

    def patched(self):
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        _ = self.args.device  # makes the shared state
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")
        return create(self)

    if MODES[mode].gpu:
        Trainer.create_accelerator_and_postprocess = patched
    try:
        yield
    finally:
        Trainer.create_accelerator_and_postprocess = create


def check(mode: str, trainer: Trainer, world: int) -> None:
    """Asserts, during training, that the mode is active."""
    from torch.distributed.tensor import DTensor

    kind = MODES[mode].kind
    assert trainer.accelerator.distributed_type == kind, trainer.accelerator.distributed_type
    assert trainer.args.world_size == world == trainer.accelerator.num_processes
    weights = dict(trainer.model.named_parameters())
    if MODES[mode].sharded and (world > 1 or MODES[mode].load is None):
        assert all(isinstance(weight, DTensor) for name, weight in weights.items() if weight.ndim == 2), weights
        assert trainer.accelerator.distributed_type != "FSDP" or trainer.accelerator.is_fsdp2
    if kind == "DEEPSPEED":
        assert trainer.deepspeed.zero_optimization_stage() == int(mode[-1])
        assert (mode == "zero3") == all(weight.numel() == 0 for weight in weights.values())
    if mode == "ddp":
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
