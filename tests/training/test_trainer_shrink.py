"""The final model of a trainer without what was pruned: checkpoints that resume, cards, evaluation, refusals."""

import logging
from pathlib import Path

import pytest
import torch
from helpers.tiny import SCHEDULE, arguments, bert, make, same, samples, weights
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_sparse import (
    PruningConfigError,
    ShrinkError,
    SparseTrainer,
    SparseTrainingArguments,
    SparsityCallback,
    SparsityReport,
)
from hf_sparse.structured.plan import ShrinkPlan


NEURONS = {"pattern": "neuron", "target_sparsity": 0.6, **SCHEDULE}  # 16 of 40 neurons are kept


def opened(folder: Path):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def logits(model) -> torch.Tensor:
    batch = torch.tensor([sample["input_ids"] for sample in samples()])
    with torch.no_grad():
        return model.eval()(batch).logits


def test_the_final_model_is_smaller_and_checkpoints_are_not(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    options |= {"load_best_model_at_end": True, "shrink": True} | NEURONS
    trainer = make(tmp_path / "out", **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    small = opened(tmp_path / "out")
    kept = weights(small)  # read now: an opened model may be a view of its file, which is written again below
    assert small.config.intermediate_size == 16 and trainer.model.config.intermediate_size == 40
    assert torch.allclose(logits(small), logits(trainer.model), atol=1e-6)
    assert opened(tmp_path / "out" / "checkpoint-10").config.intermediate_size == 40
    assert SparsityReport.load(tmp_path / "out" / "pruning_report.json").layers[0].shape == (16, 24)
    text = (tmp_path / "out" / "README.md").read_text()
    before, after = (sum(parameter.numel() for parameter in model.parameters()) for model in (trainer.model, small))
    assert f"| parameters | {before:,} | {after:,} |" in text and "## Sparsity" not in text
    assert not list((tmp_path / "out").glob(".shrunk*"))

    resumed = make(tmp_path / "out", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert same(weights(resumed.model), weights(trainer.model))
    resumed.save_model()
    assert same(weights(opened(tmp_path / "out")), kept)


def test_any_save_can_be_smaller_or_not(tmp_path):
    trainer = make(tmp_path / "out", **NEURONS)
    trainer.train()
    trainer.save_model(str(tmp_path / "small"), shrink=True)
    trainer.save_model()
    assert opened(tmp_path / "small").config.intermediate_size == 16
    assert opened(tmp_path / "out").config.intermediate_size == 40
    trainer.save_model(str(tmp_path / "small"))
    assert opened(tmp_path / "small").config.intermediate_size == 40 and ShrinkPlan.load(tmp_path / "small") is None
    # Training goes on from a smaller model as from any other.
    trainer.save_model(str(tmp_path / "small"), shrink=True)
    Trainer(opened(tmp_path / "small"), arguments(tmp_path / "again"), train_dataset=samples()).train()


def test_an_upload_is_of_the_smaller_model(tmp_path, hub):
    trainer = make(tmp_path / "out", push_to_hub=True, shrink=True, **NEURONS)
    trainer.train()
    trainer.save_model()
    (repo,) = hub.repos.values()
    assert repo.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert opened(tmp_path / "out").config.intermediate_size == 16
    assert b"## Size" in repo.files["README.md"] and "pruning_shrink.json" in repo.files


def test_layers_of_different_sizes(tmp_path):
    heads = {"pattern": "head", "target_sparsity": 0.5, **SCHEDULE}
    trainer = make(tmp_path / "out", shrink=True, heterogeneous=True, **heads)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    small = opened(tmp_path / "out")
    assert small.bert.encoder.layer[0].attention.self.query.weight.shape == (12, 24)
    assert torch.allclose(logits(small), logits(trainer.model), atol=1e-6)
    assert ModelCard.load(tmp_path / "out" / "README.md").text.split("# out\n")[1].lstrip().startswith("**This model")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pattern": "head"}, "Prune neurons to a quarter instead: .* Or add `heterogeneous=True`"),
        ({"pattern": "neuron", "scope": "global"}, "the config has one size for all of them"),
        ({"pattern": "layer"}, "with `layers` of hf_sparse.shrink"),
        ({"pattern": "layer", "heterogeneous": True}, "with `layers` of hf_sparse.shrink"),
        ({"pattern": "4x1"}, 'the pattern is "4x1", whose zeros cannot be removed: use `pattern="neuron"`'),
    ],
)
def test_what_cannot_be_removed_is_refused_before_training(tmp_path, options, error):
    with pytest.raises(PruningConfigError, match=error):
        make(tmp_path, model=bert(num_hidden_layers=2), shrink=True, target_sparsity=0.5, **options)
    assert not list(tmp_path.iterdir())


def test_options_that_would_have_no_effect_are_refused(tmp_path):
    with pytest.raises(PruningConfigError, match="`heterogeneous` needs `shrink`"):
        SparseTrainingArguments(str(tmp_path), heterogeneous=True)
    with pytest.raises(ValueError, match="nothing is pruned"):
        SparseTrainer(bert(), arguments(tmp_path, SparseTrainingArguments, shrink=True)).train()
    args = arguments(tmp_path, shrink=True, **NEURONS)
    with pytest.raises(ValueError, match="`shrink` needs SparseTrainer"):
        Trainer(bert(), args, train_dataset=samples(), callbacks=[SparsityCallback()]).train()


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_model_that_cannot_be_made_smaller_is_saved_as_it_is(tmp_path, caplog):
    """Training ended before the first prune step."""
    trainer = make(tmp_path / "out", callbacks=[StopEarly()], shrink=True, **NEURONS)
    trainer.train()
    with caplog.at_level(logging.ERROR), pytest.raises(ShrinkError, match="nothing can be removed"):
        trainer.save_model()
    assert same(weights(opened(tmp_path / "out")), weights(trainer.model)) and "has the whole model" in caplog.text
