"""MaskLoRA against the same model written with torch's parametrizations, in every way that Trainer steps."""

import pytest
import torch
from helpers.mixed import Mixed
from helpers.sparse import KeptZeros, pruned, tuned
from helpers.tiny import bert, gpt2, make, same, weights
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback

from hf_sparse import SparseTrainer
from hf_sparse.model.layers import find_layers
from hf_sparse.training.tuning.masked_lora import LowRankUpdate, MaskedLora


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Weight decay would also reach A and B of the reference, and clipping would see other gradients.
PLAIN = {"weight_decay": 0.0, "max_grad_norm": 0.0}


class MaskedLowRank(nn.Module):
    """W0 -> W0 + M * (alpha / rank) B A, differentiated by autograd."""

    def __init__(self, weight, A, B, scale, transposed):
        super().__init__()
        self.register_buffer("mask", (weight != 0).float())
        self.A, self.B, self.scale, self.transposed = (
            nn.Parameter(A.clone()),
            nn.Parameter(B.clone()),
            scale,
            transposed,
        )

    def forward(self, weight):
        product = self.scale * (self.B @ self.A)
        return weight + self.mask * (product.T if self.transposed else product)


def reference(model, tuning, seed):
    """The model with the parametrization on each selected weight, and the parameters frozen that are not trained."""
    trained = tuning.trained_parameters(model)
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in find_layers(model) if layer.in_blocks]
    updates = {layer: tuning.new_update(layer, generator) for layer in layers}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for layer, update in updates.items():
        module = model.get_submodule(layer.module)
        scale, transposed = tuning.alpha / tuning.rank, layer.kind == "conv1d"
        update = MaskedLowRank(module.weight.detach(), update.A.detach(), update.B.detach(), scale, transposed)
        parametrize.register_parametrization(module, "weight", update)
    return model


def dense(model):
    """The weights of the reference, under the names of the model."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return weights(model)


def relative(difference, change):
    return float(difference.norm() / change.norm())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("make_model", [bert, gpt2])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_training_is_that_of_the_parametrized_model(tmp_path, make_model, optim, accumulated):
    """Without biases: the gradient of those of keys is zero but for rounding, which these optimizers scale up."""
    tuning = MaskedLora(rank=3, alpha=5.0, train_biases=False)
    options = {"optim": optim, "gradient_accumulation_steps": accumulated, **PLAIN}
    options["learning_rate"] = 1.0 if optim == "sgd" else 5e-3
    trainer = tuned(tmp_path / "ours", pruned(make_model()), tune=tuning, **options)
    before = weights(trainer.model)
    trainer.train()
    other = reference(pruned(make_model()), tuning, trainer.args.seed)
    make(tmp_path / "reference", Trainer, other, **options).train()
    after, expected = weights(trainer.model), dense(other)
    assert after.keys() == expected.keys()
    trained = {*trainer.sparsity_callback.pruner.masks, *tuning.trained_parameters(trainer.model)}
    for name, weight in after.items():
        if name in trained:
            assert relative(weight - expected[name], weight - before[name]) < 0.01, name
        else:
            assert same({name: weight}, {name: expected[name]}) and same({name: weight}, {name: before[name]})


@pytest.mark.parametrize("layer", find_layers(Mixed()), ids=lambda layer: layer.kind)
def test_the_update_of_each_matrix_has_the_rank(layer):
    update = LowRankUpdate(layer, 2, 4.0, torch.Generator().manual_seed(0))
    assert not update().any()
    nn.init.normal_(update.B)
    change = update()
    assert change.shape == layer.shape and change.dtype == torch.float32
    for matrix in layer.matrices(change.detach()):
        assert torch.linalg.matrix_rank(matrix.reshape(matrix.shape[0], -1)) == 2
    gradient = torch.randn(layer.shape)
    change.backward(gradient)
    experts = range(layer.num_matrices) if layer.expert_dim is not None else [...]
    for expert in experts:
        G = gradient[expert].T if layer.row_dim > layer.column_dim else gradient[expert].flatten(1)
        A, B = update.A[expert], update.B[expert]
        assert torch.allclose(update.B.grad[expert], 2.0 * G @ A.T, atol=1e-5)
        assert torch.allclose(update.A.grad[expert], 2.0 * B.T @ G, atol=1e-5)


def test_the_rank_is_at_most_that_of_the_weight():
    layer = find_layers(nn.Linear(3, 5))[0]
    update = LowRankUpdate(layer, 16, 32.0, torch.Generator())
    assert update.A.shape == (3, 3) and update.B.shape == (5, 3) and update.scale == 2.0


class Recorder(TrainerCallback):
    """Weights and gradients right before and after each optimizer step."""

    def __init__(self, trainer):
        self.trainer, self.skipped, self.dtypes = trainer, [], set()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = weights(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        updates = self.trainer.tuner.updates
        assert all(model.get_parameter(name).grad is None for name in updates)
        self.dtypes |= {value.dtype for update in updates.values() for value in update.parameters()}
        assert all(value.grad is not None for update in updates.values() for value in update.parameters())
        decays = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
        assert {decays[id(value)] for update in updates.values() for value in update.parameters()} == {0.0}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if same(self.before, weights(model)):
            self.skipped.append(state.global_step + 1)


class Float16Trainer(SparseTrainer):
    """Trains on the CPU with the gradient scaler of fp16; the gradients overflow at steps 2 and 5."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step + 1 in (2, 5):
            self.model.bert.encoder.layer[0].attention.self.query.weight.grad[0, 0] = torch.inf
        return loss


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_steps_that_the_loss_scaler_skips_change_nothing(tmp_path, optim, max_grad_norm):
    trainer = tuned(tmp_path, trainer=Float16Trainer, tune="masked_lora", optim=optim, max_grad_norm=max_grad_norm)
    seen, zeros = Recorder(trainer), KeptZeros(trainer.model)
    for callback in (seen, zeros):
        trainer.add_callback(callback)
    trainer.train()
    assert seen.skipped == [2, 5]
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


def test_the_loss_scale_does_not_reach_the_updates(tmp_path):
    """1024 here; autocast rounds."""

    class Scaled(Float16Trainer):
        def training_step(self, *args, **kwargs):
            return SparseTrainer.training_step(self, *args, **kwargs)

    results = []
    for name, cls in (("plain", SparseTrainer), ("scaled", Scaled)):
        model = pruned(bert(**NO_DROPOUT))
        start = weights(model)
        options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 3, "max_grad_norm": 0.0}
        tuned(tmp_path / name, model, trainer=cls, tune="masked_lora", **options).train()
        results.append(weights(model))
    for name in ("bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.output.dense.weight"):
        plain, scaled = (result[name] for result in results)
        assert relative(plain - scaled, plain - start[name]) < 0.1


def test_weights_in_bfloat16(tmp_path):
    """A and B are float32: many small updates add up that bfloat16 weights would lose one by one."""
    model = pruned(bert().bfloat16())
    start = weights(model)
    trainer = tuned(tmp_path, model, tune="masked_lora", learning_rate=1e-3, save_strategy="steps", save_steps=5)
    seen, zeros = Recorder(trainer), KeptZeros(model)
    for callback in (seen, zeros):
        trainer.add_callback(callback)
    trainer.train()
    assert seen.dtypes == {torch.float32}
    after = weights(trainer.model)
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert all((after[name] != start[name]).float().mean() > 0.1 for name in zeros.masks)
    resumed = tuned(tmp_path, bert(3).bfloat16(), tune="masked_lora", learning_rate=1e-3, save_strategy="no")
    resumed.train(str(tmp_path / "checkpoint-5"))
    assert same(weights(resumed.model), after)


def test_clipping_scales_the_gradients_of_the_updates(tmp_path):
    """`max_grad_norm` sees the gradients of the weights."""
    changes = []
    for limit in (0.0, 1e-4):
        model = pruned(bert(**NO_DROPOUT))
        start = weights(model)
        options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": limit}
        trainer = tuned(tmp_path, model, tune="masked_lora", logging_steps=1, **options)
        trainer.train()
        norm = trainer.state.log_history[0]["grad_norm"]
        name = "bert.encoder.layer.0.output.dense.weight"
        changes.append(float((weights(model)[name] - start[name]).norm()) / (limit / norm if limit else 1.0))
    assert changes[0] > 0 and changes[1] == pytest.approx(changes[0], rel=0.1)


def test_activation_checkpointing_and_compilation(tmp_path):
    results = []
    for name, options in (
        ("plain", {}),
        ("checkpointed", {"gradient_checkpointing": True}),
        ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ):
        model = pruned(bert(**NO_DROPOUT))
        trainer = tuned(tmp_path / name, model, tune="masked_lora", max_steps=4, **options)
        trainer.add_callback(KeptZeros(model))
        trainer.train()
        results.append(weights(trainer.model))
    for other in results[1:]:
        assert all(torch.allclose(weight, other[name], atol=1e-5) for name, weight in results[0].items())


class OutOfMemory(SparseTrainer):
    """The batch that it starts with does not fit."""

    failed = False

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


def test_a_smaller_batch_after_out_of_memory(tmp_path):
    trainer = tuned(tmp_path, trainer=OutOfMemory, tune="masked_lora", auto_find_batch_size=True)
    trainer.add_callback(KeptZeros(trainer.model))
    trainer.train()
    assert trainer.failed and trainer.state.global_step == 10
    assert len(trainer.optimizer.param_groups) == 3  # with and without decay, and the updates
