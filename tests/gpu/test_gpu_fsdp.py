"""NCCL and FSDP2 with a world of one GPU; on the CPU, gloo."""

import socket
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from helpers.invariants import TARGET, exactly_positive_zero
from helpers.modes import MODES, as_on_gpus, deterministic_bert
from helpers.tiny import SCHEDULE, STEPS, make
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_sparse import Pruner, PruningConfig
from hf_sparse.distributed.communicator import DistributedCommunicator


@pytest.fixture
def world(device, tmp_path):
    """A process group of this process alone."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/rendezvous",
        rank=0,
        world_size=1,
    )
    yield device
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("memory", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_collectives_take_and_return_tensors_of_any_memory(world, memory, dtype):
    communicator = DistributedCommunicator()
    where = torch.device("cpu") if memory == "host" else world
    tensor = torch.arange(7).to(where, dtype)
    for result in (*communicator.all_gather(tensor), *communicator.all_to_all([tensor], [7])):
        assert result.device.type == where.type and torch.equal(result, tensor)
    assert communicator.sum_counts(np.array([3, 2**40])).tolist() == [3, 2**40]
    assert communicator.any(True) and not communicator.any(False)
    if dtype.is_floating_point:
        total = tensor.clone()
        communicator.all_reduce(total)
        assert torch.equal(total, tensor)


@pytest.mark.parametrize("through", ["alone", "collectives"])
@pytest.mark.parametrize("options", [{}, {"scope": "row", "criterion": "snip"}, {"pattern": "4x1"}], ids=str)
def test_masks_of_sharded_weights_are_those_of_whole_ones(world, monkeypatch, options, through):
    if through == "collectives":
        monkeypatch.setattr("hf_sparse.distributed.build.get_communicator", DistributedCommunicator)
    plain, sharded = (deterministic_bert().to(world) for _ in range(2))
    fully_shard(sharded.bert.encoder.layer[0])
    fully_shard(sharded)
    config = PruningConfig(target_sparsity=TARGET, **options)
    digests = []
    for model in (plain, sharded):
        pruner = Pruner(model, config)
        tokens = torch.arange(2, 34).view(4, 8).to(world)
        for step in range(3):
            model(input_ids=tokens, labels=torch.tensor([0, 1, 0, 1], device=world)).loss.backward()
            assert pruner.observe()
            pruner.update(step + 1, 3)
            model.zero_grad()
        digests.append(pruner.masks.digest())
    assert all(isinstance(weight, DTensor) for weight in sharded.parameters())
    assert digests[0] == digests[1]


@pytest.fixture
def launched(device, tmp_path, monkeypatch):
    """This process as accelerate finds it after `accelerate launch` with one process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    yield device
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


class Zeros(TrainerCallback):
    """The number of pruned weights after each optimizer step, all of which are +0.0."""

    def __init__(self, callback):
        self.callback, self.pruned = callback, []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        masks, weights = self.callback.pruner.masks, dict(model.named_parameters())
        for name, mask in masks.items():
            assert isinstance(weights[name], DTensor)
            assert exactly_positive_zero(weights[name].to_local().view(mask.shape), mask), name
        self.pruned.append(sum(masks.pruned(name) for name in masks))


def test_a_trainer_with_fsdp2(launched, tmp_path):
    on_cpu = launched.type == "cpu"
    if on_cpu:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    with as_on_gpus("fsdp2") if on_cpu else nullcontext():
        options = {"target_sparsity": TARGET, "use_cpu": on_cpu, **SCHEDULE, **MODES["fsdp2"].arguments}
        trainer = make(tmp_path, model=deterministic_bert(), **options)
        zeros = Zeros(trainer.sparsity_callback)
        trainer.add_callback(zeros)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
    assert trainer.accelerator.distributed_type == "FSDP" and trainer.accelerator.is_fsdp2
    masks = trainer.sparsity_callback.pruner.masks
    assert zeros.pruned[-1] == round(TARGET * sum(mask.numel() for mask in masks.values()))
    assert zeros.pruned == sorted(zeros.pruned) and len(zeros.pruned) == STEPS
    opened = type(deterministic_bert()).from_pretrained(tmp_path / "saved")
    for name, mask in masks.items():
        assert torch.equal(opened.get_parameter(name) == 0, ~mask.cpu().view(opened.get_parameter(name).shape)), name
