"""Training on a GPU: mixed precision with a real loss scaler, the optimizers of CUDA, compilation, resuming."""

import pytest
import torch
from helpers.invariants import TARGET, Spy
from helpers.masks import read_masks
from helpers.tiny import PRUNE_STEPS, SCHEDULE, STEPS, bert, content, make, same, weights
from transformers import TrainerCallback

from hf_sparse import SparseTrainer


OPTIMIZERS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "one by one": {"foreach": False, "fused": False},
}


def model_on(device, **config):
    return bert(attn_implementation="eager", **config).to(device)


def trainer_on(device, folder, model=None, optimizer="foreach", **options):
    model = model or model_on(device)
    groups = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1, **OPTIMIZERS[optimizer])
    fixed = {"use_cpu": device.type == "cpu", "trainer_options": {"optimizers": (groups, None)}}
    return make(folder, model=model, target_sparsity=TARGET, **fixed, **SCHEDULE | options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_pruned_weights_are_positive_zeros_after_every_step(device, precision, optimizer, tmp_path):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("Trainer has no loss scaler on the CPU")
    options = {} if precision == "float32" else {precision: True}
    trainer = trainer_on(device, tmp_path, optimizer=optimizer, **options)
    spy = Spy(trainer.sparsity_callback)
    trainer.add_callback(spy)
    trainer.train()
    assert {"optimizer_step", "step_end", "end"} <= spy.events
    assert spy.pruned_at[STEPS] == round(TARGET * spy.weights)
    assert all(parameter.device.type == device.type for parameter in trainer.model.parameters())
    assert trainer.sparsity_callback.pruner.refused_observations == 0 or precision == "fp16"


class Steps(TrainerCallback):
    """Whether each optimizer step has changed the weights that are kept, and the scale of the loss before it."""

    def __init__(self):
        self.changed, self.scales = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = weights(model)
        self.scales.append(self.trainer.accelerator.scaler.get_scale())

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        after = weights(model)
        self.changed.append(
            any(
                not torch.equal(after[name][after[name] != 0], self.before[name][after[name] != 0])
                for name in after
                if after[name].is_floating_point()
            )
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_that_the_loss_scaler_skips_are_not_observed(cuda, optimizer, tmp_path):
    trainer = trainer_on(cuda, tmp_path, optimizer=optimizer, fp16=True)
    # So large that the gradients of the first steps overflow; then they do not.
    trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**32, backoff_factor=2.0**-18)
    spy, steps = Spy(trainer.sparsity_callback), Steps()
    steps.trainer = trainer
    trainer.add_callback(spy)
    trainer.add_callback(steps)
    trainer.train()
    pruner, skipped = trainer.sparsity_callback.pruner, steps.changed.count(False)
    assert 1 <= skipped < STEPS, steps.scales
    assert steps.scales[-1] < 2.0**32
    assert steps.changed == sorted(steps.changed)  # the skipped ones come first
    assert pruner.refused_observations == skipped
    counts = {statistic.count for group in pruner.groups for statistic in group.statistics.values()}
    assert counts == {PRUNE_STEPS[-1] - skipped}  # after the last prune step nothing is observed
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert spy.pruned_at[STEPS] == round(TARGET * spy.weights)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_resumed_run_is_the_same_bit_for_bit(device, reproducible, precision, tmp_path):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("Trainer has no loss scaler on the CPU")
    options = {} if precision == "float32" else {precision: True}
    saving = {"save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch_fused"}
    run = make(
        tmp_path / "a",
        model=model_on(device),
        target_sparsity=TARGET,
        use_cpu=device.type == "cpu",
        **SCHEDULE,
        **saving,
        **options,
    )
    run.train()
    again = make(
        tmp_path / "b",
        model=model_on(device, seed=1),
        target_sparsity=TARGET,
        use_cpu=device.type == "cpu",
        **SCHEDULE,
        **saving,
        **options,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert same(weights(again.model), weights(run.model))
    expected, found = (content(tmp_path / name / f"checkpoint-{STEPS}") for name in "ab")
    assert found == expected
    masks = dict(read_masks(tmp_path / "b" / f"checkpoint-{STEPS}"))
    assert masks and all(
        torch.equal(mask, run.sparsity_callback.pruner.masks[name].cpu()) for name, mask in masks.items()
    )


def test_a_compiled_model_is_pruned(device, tmp_path):
    options = {"torch_compile": True}
    if device.type == "cpu":
        options |= {"torch_compile_backend": "eager"}
    trainer = trainer_on(device, tmp_path, **options)
    spy = Spy(trainer.sparsity_callback)
    trainer.add_callback(spy)
    trainer.train()
    assert spy.pruned_at[STEPS] == round(TARGET * spy.weights)
    trainer.save_model(str(tmp_path / "saved"))
    opened = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert same(weights(opened), {name: tensor.cpu() for name, tensor in weights(trainer.model).items()})


def test_the_trainer_is_on_the_gpu_by_default(cuda, tmp_path):
    trainer = make(tmp_path, target_sparsity=TARGET, use_cpu=False, **SCHEDULE)
    assert isinstance(trainer, SparseTrainer)
    trainer.train()
    masks = trainer.sparsity_callback.pruner.masks
    assert all(masks.bits(name).is_cuda for name in masks)
