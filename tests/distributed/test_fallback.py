"""A warning is logged where FSDP or DeepSpeed is requested, but accelerate runs DDP."""

import logging
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from helpers.modes import MODES
from helpers.tiny import SCHEDULE

from hf_sparse import SparseTrainer


OPTIONS = {"target_sparsity": 0.5, **SCHEDULE}


@pytest.mark.parametrize("options", [{}, MODES["fsdp2"].arguments], ids=["ddp", "fsdp"])
def test_warning_when_fsdp_falls_back_to_ddp(ranks, options):
    """Without `as_on_gpus`, as for a user without GPUs."""
    log = ranks.run("ddp", "fallback", options=OPTIONS | options).log
    assert log.count("FSDP was requested, but accelerate runs MULTI_CPU: DDP") == bool(options)


@pytest.mark.parametrize("runs", ["MULTI_GPU", "DEEPSPEED", "NO"])
@pytest.mark.parametrize("asked", ["argument", "launcher", None])
def test_warning_when_deepspeed_is_not_used(monkeypatch, caplog, runs, asked):
    if asked == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(distributed_type=DistributedType(runs)),
        args=SimpleNamespace(
            fsdp=None, deepspeed={"zero_optimization": {}} if asked == "argument" else None, world_size=2
        ),
        is_local_process_zero=lambda: True,
    )
    with caplog.at_level(logging.WARNING):
        SparseTrainer._warn_if_not_sharded(trainer)
    assert ("DEEPSPEED was requested" in caplog.text) == (runs == "MULTI_GPU" and asked is not None)
