"""Resumed runs with a teacher: bit for bit the same, or refused."""

import json
import shutil

import pytest
from helpers.tiny import SCHEDULE, bert, content, make, same, weights

from hf_sparse import CheckpointError
from hf_sparse.files import DISTILLATION_FILE


SAVING = {"save_strategy": "steps", "save_steps": 5}
PRUNING = {"target_sparsity": 0.5, **SCHEDULE}


def saved_teacher(tmp_path, name="teacher", seed=5):
    bert(seed=seed).save_pretrained(tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("pruning", [PRUNING, {}], ids=["pruned", "dense"])
@pytest.mark.parametrize("kind", ["self", "folder"])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, kind, pruning):
    """`self` is the model that the run started from, not the checkpoint's; a folder may have moved."""
    teacher = "self" if kind == "self" else saved_teacher(tmp_path)
    options = {**pruning, **SAVING, "distill_hidden": 0.5}
    whole = make(tmp_path / "whole", distill_teacher=teacher, **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    if kind == "folder":
        teacher = shutil.move(teacher, tmp_path / "moved")
    resumed = make(tmp_path / "resumed", distill_teacher=str(teacher), **options)
    resumed.train(resume_from_checkpoint=True if kind == "self" else str(tmp_path / "resumed" / "checkpoint-5"))
    assert same(weights(resumed.model), weights(whole.model)) and same(
        weights(resumed.teacher), weights(whole.teacher)
    )
    if pruning:
        contents = [content(tmp_path / name / "checkpoint-10") for name in ("whole", "resumed")]
        assert contents[0] == contents[1]
    elif kind == "self":
        assert same(weights(whole.teacher), bert().state_dict())


def test_the_same_trainer_resumes_with_its_teacher(tmp_path):
    trainer = make(tmp_path, distill_teacher="self", **PRUNING, **SAVING)
    trainer.train()
    first = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(weights(trainer.model), first)


@pytest.fixture
def checkpoint(tmp_path):
    make(tmp_path, distill_teacher="self", **PRUNING, **SAVING).train()
    return tmp_path / "checkpoint-5"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distill_teacher": "self", "seed": 9}, "the trainer was made with a model with other weights"),
        ({"distill_teacher": "other"}, "`distill_teacher` has other weights than that of .*, 'self'"),
        ({"distill_teacher": "self", "distill_alpha": 0.5}, "`distill_alpha`: 0.9 -> 0.5"),
        (
            {"distill_teacher": "self", "distill_teacher_dtype": "bfloat16"},
            "`distill_teacher_dtype`: None -> 'bfloat16'",
        ),
        ({}, "was saved by a run with `distill_teacher`, and this run has none"),
    ],
)
def test_another_teacher_is_refused(tmp_path, checkpoint, options, message):
    options = dict(options)
    model = bert(seed=options.pop("seed", 0))
    if options.get("distill_teacher") == "other":
        options["distill_teacher"] = saved_teacher(tmp_path)
    trainer, before = make(tmp_path, model=model, **options, **PRUNING), weights(model)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(trainer.model), before)


def test_a_checkpoint_without_a_teacher_is_refused(tmp_path):
    make(tmp_path, **PRUNING, **SAVING).train()
    trainer = make(tmp_path, distill_teacher="self", **PRUNING)
    with pytest.raises(CheckpointError, match="saved by a run without `distill_teacher`"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_run_without_a_teacher_leaves_no_file_of_an_earlier_one(tmp_path, checkpoint):
    assert json.loads((checkpoint / DISTILLATION_FILE).read_text())["teacher"] == "self"
    make(tmp_path, **PRUNING, **SAVING).train()
    assert not (checkpoint / DISTILLATION_FILE).exists()
