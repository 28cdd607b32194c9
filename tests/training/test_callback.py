"""SparsityCallback by itself, where the trainers' tests do not reach."""

import pytest
import torch
from helpers.tiny import SCHEDULE, bert, make, weights, zeros
from transformers import Trainer

from hf_sparse import PruningConfig, SparsityCallback
from hf_sparse.files import STATE_FILE
from hf_sparse.training.resume import ResumeState


def test_it_takes_a_config_and_nothing_else():
    with pytest.raises(TypeError, match="takes a PruningConfig, not dict"):
        SparsityCallback({"target_sparsity": 0.5})


def test_without_any_config_it_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="needs a PruningConfig"):
        make(tmp_path, Trainer, callbacks=[SparsityCallback])


def test_weights_left_out_by_their_shape_are_named(tmp_path, caplog):
    config = {"pattern": "16x1", "target_sparsity": 0.5, "on_indivisible": "skip"}
    trainer = make(tmp_path, model=bert(hidden_size=24, intermediate_size=32), **config)
    assert "does not divide them: bert.encoder.layer.0.attention.self.query.weight, " in caplog.text
    trainer.train()
    assert list(trainer.sparsity_callback.pruner.parameters) == ["bert.encoder.layer.0.intermediate.dense.weight"]


def test_a_stock_trainer_gets_masks_beside_the_weights(tmp_path):
    callback = SparsityCallback(PruningConfig(target_sparsity=0.5, **SCHEDULE))
    make(tmp_path, Trainer, callbacks=[callback], save_strategy="steps", save_steps=4).train()
    for step in (4, 8):
        assert ResumeState(tmp_path / f"checkpoint-{step}").files[0].values["step"] == step
        assert (tmp_path / f"checkpoint-{step}" / "pruning_config.json").is_file()


def test_masks_of_more_processes_do_not_outlive_a_new_run(tmp_path):
    stale = tmp_path / "checkpoint-4" / "pruning_state-00001-of-00004.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier run")
    callback = SparsityCallback(PruningConfig(target_sparsity=0.5, **SCHEDULE))
    make(tmp_path, Trainer, callbacks=[callback], save_strategy="steps", save_steps=4).train()
    assert [path.name for path in stale.parent.glob("pruning_state*")] == [STATE_FILE]
    assert len(ResumeState(stale.parent).files) == 1


def test_a_stock_trainer_that_saves_elsewhere_gets_a_warning_and_no_stray_folder(tmp_path, caplog):
    class Elsewhere(Trainer):
        def _get_output_dir(self, trial):  # as in a search over hyperparameters
            return str(tmp_path / "run-0")

    callback = SparsityCallback(PruningConfig(target_sparsity=0.5, **SCHEDULE))
    make(tmp_path, Elsewhere, callbacks=[callback], save_strategy="steps", save_steps=10).train()
    assert "no masks were written" in caplog.text
    assert not (tmp_path / "checkpoint-10").exists()
    assert not list(tmp_path.rglob(STATE_FILE))


def test_one_callback_in_two_trainers_prunes_each_model_by_itself(tmp_path):
    callback = SparsityCallback(PruningConfig(target_sparsity=0.5, scope="layer"))
    first = make(tmp_path, Trainer, callbacks=[callback])
    first.train()
    before = weights(first.model)
    second = make(tmp_path, Trainer, model=bert(seed=1), callbacks=[callback])
    second.train()
    assert callback.pruner.model is second.model
    assert all(torch.equal(before[name], value) for name, value in weights(first.model).items())
    assert zeros(first.model) == zeros(second.model) == 2112
    pairs = zip(first.model.bert.encoder.parameters(), second.model.bert.encoder.parameters(), strict=True)
    assert any(not torch.equal(mine == 0, other == 0) for mine, other in pairs)


def test_zeros_of_a_checkpoint_are_locked_and_the_rest_is_trained(tmp_path):
    model = bert()
    block = model.bert.encoder.layer[0]
    for weight in (block.intermediate.dense.weight, block.output.dense.weight):
        weight.data.view(-1)[::3] = 0
    found = {name: weight == 0 for name, weight in model.named_parameters() if name.endswith("dense.weight")}
    before = weights(model)
    trainer = make(tmp_path, model=model, keep_zeros=True)
    trainer.train()
    for name, locked in found.items():
        weight = dict(model.named_parameters())[name]
        assert torch.equal(weight == 0, locked)
        assert not torch.equal(weight, before[name])


def test_zeros_of_a_checkpoint_count_towards_a_target(tmp_path):
    model = bert()
    model.bert.encoder.layer[0].attention.self.query.weight.data.view(-1)[::3] = 0
    make(tmp_path, model=model, keep_zeros=True, target_sparsity=0.5, scope="layer").train()
    pooled = model.bert.encoder.layer[0].attention.self.query.weight
    assert not pooled.view(-1)[::3].any()
    assert zeros(model) == 2112
