"""Uploads of trainers: every way to request one, and what remains when it fails."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.hub_server import READ_TOKEN, TOKEN, USER
from helpers.masks import read_masks
from helpers.tiny import SCHEDULE, STEPS, make, same, weights
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_sparse import PruningConfig, SparseTrainer, SparsityCallback, UploadError


REPO = f"{USER}/out"
PRUNING = {"target_sparsity": 0.5, "criterion": "magnitude", **SCHEDULE}
MODEL = {"config.json", "model.safetensors", "training_args.bin"}
PRUNING_FILES = {"pruning_config.json", "pruning_report.json"}
FIGURES = {"pruning_schedule.png", "pruning_layers.png"}
RESUMABLE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "pruning_state.safetensors"}
CHECKPOINT = MODEL | PRUNING_FILES | RESUMABLE


def pushing(folder, **options):
    """A trainer that uploads to `REPO`."""
    return make(folder / "out", **{"push_to_hub": True, **PRUNING, **options})


def inside(folder: str, names: set[str]) -> set[str]:
    return {f"{folder}/{name}" for name in names}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STRATEGIES = {
    "end": set(),
    "every_save": MODEL | PRUNING_FILES | FIGURES,
    "checkpoint": MODEL | PRUNING_FILES | FIGURES | inside("last-checkpoint", CHECKPOINT),
    "all_checkpoints": MODEL
    | PRUNING_FILES
    | FIGURES
    | inside("checkpoint-5", CHECKPOINT)
    | inside("checkpoint-10", CHECKPOINT),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_each_strategy_uploads(hub, plots, tmp_path, strategy):
    options = {"save_strategy": "steps", "save_steps": 5, "hub_always_push": True}
    trainer = pushing(tmp_path, hub_strategy=strategy, **options)
    trainer.train()
    repo = hub.repos[REPO]
    assert repo.files.keys() == STRATEGIES[strategy]
    if strategy != "end":
        assert repo.files["pruning_report.json"] == (tmp_path / "out/checkpoint-10/pruning_report.json").read_bytes()
        assert repo.files["model.safetensors"] == (tmp_path / "out/checkpoint-10/model.safetensors").read_bytes()
    for path in repo.files:
        folder, _, name = path.rpartition("/")
        if folder:
            local = tmp_path / "out" / folder.replace("last-checkpoint", "checkpoint-10") / name
            assert repo.files[path] == local.read_bytes()

    trainer.push_to_hub()
    assert repo.files.keys() == STRATEGIES[strategy] | MODEL | PRUNING_FILES | FIGURES | {
        "README.md",
        "pruning_card.json",
    }
    top = {name: data for name, data in repo.files.items() if "/" not in name}
    assert top == {name: data for name, data in content(tmp_path / "out").items() if "/" not in name}


def test_an_uploaded_model_loads_in_another_process(hub, tmp_path):
    trainer = pushing(tmp_path)
    trainer.train()
    trainer.push_to_hub(tags="digits")
    card = ModelCard.load(REPO).data
    assert "digits" in card.tags and card.library_name == "transformers"
    code = (
        "from safetensors.torch import save_file; "
        "from transformers import AutoModelForSequenceClassification as Model; "
        f"save_file(Model.from_pretrained('{REPO}').state_dict(), 'back.safetensors')"
    )
    environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=300)
    back, here = load_file(tmp_path / "back.safetensors"), weights(trainer.model)
    assert same(back, here)
    selected = trainer.sparsity_callback.pruner.masks
    assert sum(int((weight == 0).sum()) for name, weight in back.items() if name in selected) == 2112


class StopAt(TrainerCallback):
    """Ends training after a step, as if it had been killed."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_run_resumes_from_the_checkpoint_on_the_hub(hub, tmp_path):
    options = {"hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 5}
    pushing(tmp_path, callbacks=[StopAt(5)], **options).train()
    there = Path(snapshot_download(REPO, allow_patterns="last-checkpoint/*")) / "last-checkpoint"
    masks = dict(read_masks(there))
    assert len(masks) == 6 and sum(int((~mask).sum()) for mask in masks.values()) == 1848, "0.4375 of 4,224"

    whole = make(tmp_path / "whole", **PRUNING)
    whole.train()
    resumed = make(tmp_path / "resumed", **PRUNING)
    resumed.train(resume_from_checkpoint=str(there))
    assert same(weights(resumed.model), weights(whole.model))


class After(TrainerCallback):
    def __init__(self, event):
        self.event = event

    def on_train_end(self, *args, **kwargs):
        self.event.set()


def test_the_last_save_is_uploaded_although_an_earlier_upload_is_running(hub, plots, tmp_path):
    """Trainer leaves out the uploads of saves while another runs: here the first runs until training is over."""
    over = threading.Event()
    hub.fail("/commit/", status=None, times=1, until=over.wait)
    options = {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2}
    trainer = pushing(tmp_path, callbacks=[After(over)], **options)
    trainer.train()
    messages = [message for message, _ in hub.repos[REPO].commits]
    assert messages == ["Training in progress, step 2", "Training in progress, step 10"]
    assert hub.repos[REPO].files == content_of_model(tmp_path / "out")


def test_the_end_of_training_does_not_change_files_during_their_upload(hub, plots, tmp_path, caplog):
    """The figures of the end differ from those of step 6, whose upload has announced its own, and sends them late."""
    over = threading.Event()
    hub.fail("/objects/batch", status=None, times=1, until=over.wait)
    trainer = pushing(tmp_path, hub_strategy="every_save", save_strategy="steps", save_steps=6)
    trainer.add_callback(After(over))
    trainer.train()
    messages = [message for message, _ in hub.repos[REPO].commits]
    assert messages == ["Training in progress, step 6", "Training in progress, step 10"]
    assert "failed" not in caplog.text
    assert all(FIGURES <= set(added) for _, added in hub.repos[REPO].commits), "they did change"


def content_of_model(folder):
    return {name: data for name, data in content(folder).items() if "checkpoint-" not in name}


BROKEN = {
    "refused": (lambda hub, patch: hub.refuse(), "could not be reached"),
    "busy": (lambda hub, patch: hub.fail("POST ", 503), "answered 503"),
    "no permission": (lambda hub, patch: patch.setenv("HF_TOKEN", READ_TOKEN), r"no write permission \(403\)"),
    "no token": (lambda hub, patch: patch.delenv("HF_TOKEN"), r"\(401\): log in"),
    "offline": (lambda hub, patch: patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE"),
    "cut": (lambda hub, patch: hub.fail("PUT |create", 0), "the connection was cut"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_failing_hub_is_reported_before_training(hub, tmp_path, monkeypatch, broken):
    happen, message = BROKEN[broken]
    happen(hub, monkeypatch)
    with pytest.raises(UploadError, match=message) as raised:
        pushing(tmp_path)
    assert "leave `push_to_hub` out" in str(raised.value)
    assert str(raised.value).endswith(f"hf-sparse push {tmp_path / 'out'} out")


@pytest.mark.parametrize("broken", BROKEN)
def test_a_hub_that_fails_after_training_does_not_lose_the_model(hub, tmp_path, monkeypatch, caplog, broken):
    trainer = pushing(tmp_path, hub_private_repo=True)
    trainer.train()
    happen, message = BROKEN[broken]
    happen(hub, monkeypatch)
    command = f"hf-sparse push {tmp_path / 'out'} {REPO} --private"
    with caplog.at_level(logging.ERROR, "hf_sparse"):
        trainer.save_model()
    assert command in caplog.text, "saving succeeded: the failure of the upload is only logged"
    with pytest.raises(UploadError, match=message) as raised:
        trainer.push_to_hub()
    assert str(raised.value).endswith(command)
    assert not hub.repos[REPO].commits
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert same(weights(kept), weights(trainer.model))
    assert trainer.evaluate()["eval_loss"] > 0, "the trainer goes on"


def test_push_to_hub_saves_before_it_contacts_the_hub(hub, tmp_path):
    trainer = make(tmp_path / "out", **PRUNING)
    trainer.train()
    hub.refuse()
    with pytest.raises(UploadError):
        trainer.push_to_hub()
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert same(weights(kept), weights(trainer.model))


def test_push_to_hub_needs_no_argument(hub, tmp_path):
    trainer = make(tmp_path / "out", **PRUNING)
    trainer.train()
    trainer.push_to_hub("By method")
    assert MODEL | PRUNING_FILES <= hub.repos[REPO].files.keys()
    job = trainer.push_to_hub(blocking=False, tags=["later"])
    assert job.result().commit_url.startswith(hub.url)
    assert [message for message, _ in hub.repos[REPO].commits] == ["By method", "End of training"]


@pytest.mark.parametrize("status", [503, 0])
def test_a_push_with_a_transient_failure_is_retried(hub, tmp_path, status):
    trainer = pushing(tmp_path)
    trainer.train()
    hub.fail("/commit/", status, times=2)
    assert trainer.push_to_hub("Pushed").commit_url.startswith(hub.url)
    assert [message for message, _ in hub.repos[REPO].commits] == ["Pushed"]
    assert hub.repos[REPO].files == content(tmp_path / "out")


def test_a_failed_background_upload_is_logged_and_changes_nothing_else(hub, tmp_path, caplog):
    undisturbed = make(tmp_path / "undisturbed", **PRUNING)
    undisturbed.train()
    trainer = pushing(tmp_path, hub_strategy="checkpoint", save_strategy="steps", save_steps=5, hub_always_push=True)
    hub.fail("/commit/", 403)
    trainer.train()
    assert same(weights(trainer.model), weights(undisturbed.model))
    logged = [record for record in caplog.records if record.name.startswith("hf_sparse")]
    assert {record.levelname for record in logged[:-1]} == {"WARNING"} and len(logged) == 4 + 1
    assert "The last checkpoint is not on the Hub. " in caplog.text and "(403)" in caplog.text
    assert logged[-1].levelname == "ERROR" and logged[-1].getMessage().endswith(
        f"hf-sparse push {tmp_path / 'out'} {REPO}"
    )


def test_a_transient_failure_of_a_background_upload_is_made_up_for(hub, tmp_path, caplog):
    trainer = pushing(tmp_path, hub_strategy="every_save", save_strategy="steps", save_steps=10)
    hub.fail("/commit/", 503, times=1)
    trainer.train()
    assert len(hub.repos[REPO].commits) == 1
    assert "background upload failed. The Hub answered 503" in caplog.text and "The last checkpoint" not in caplog.text


def test_uploads_that_trainer_does_not_show_are_never_silent(hub, tmp_path, monkeypatch, caplog):
    """As if a release of transformers had renamed its private method, and the attribute with the uploads."""
    options = {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 5, "hub_always_push": True}
    upload = Trainer._push_from_checkpoint

    def renamed(trainer, folder):
        upload(trainer, folder)
        trainer._pushes, trainer.push_in_progress = trainer.push_in_progress, None

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", renamed)
    trainer = pushing(tmp_path, **options)
    trainer.train()
    trainer._pushes.wait_until_done()
    assert "does not show the uploads that it starts" in caplog.text

    trainer.is_upload_skipped = True
    monkeypatch.setattr(SparseTrainer, "_push_from_checkpoint", None)
    trainer.finish_pushes()
    assert caplog.text.rstrip().endswith(f"hf-sparse push {tmp_path / 'out'} {REPO}")


@pytest.mark.parametrize("trainer", [SparseTrainer, Trainer], ids=["SparseTrainer", "Trainer"])
def test_no_file_log_or_upload_has_the_token(hub, tmp_path, monkeypatch, caplog, capfd, trainer):
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level(logging.DEBUG)
    pruning = PRUNING if trainer is SparseTrainer else {"callbacks": [SparsityCallback(PruningConfig(**PRUNING))]}
    options = {"hub_token": TOKEN, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 5}
    run = make(tmp_path / "out", trainer, push_to_hub=True, report_to="tensorboard", **options, **pruning)
    run.train()
    run.evaluate()
    run.save_model()
    run.save_state()
    run.push_to_hub()
    print(run.args, run.args.to_json_string())
    assert run.args.hub_token == TOKEN and len(hub.asked("/commit/")) >= 3

    written = content(tmp_path)
    assert sum(name.endswith("training_args.bin") for name in written) == 3
    assert any("tfevents" in name for name in written)
    uploaded = {request.path: request.body for request in hub.requests} | hub.repos[REPO].files | hub.objects
    said = {"log": caplog.text.encode(), "console": "".join(capfd.readouterr()).encode()}
    assert not [name for name, data in (written | uploaded | said).items() if TOKEN.encode() in data]
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert saved.hub_token == "<HUB_TOKEN>" and saved.max_steps == STEPS


def test_a_stock_trainer_saves_the_token_in_its_arguments(hub, tmp_path):
    """The search of the test before this one finds a token where there is one."""
    make(tmp_path / "out", Trainer, push_to_hub=True, hub_token=TOKEN).save_model()
    assert [name for name, data in content(tmp_path).items() if TOKEN.encode() in data] == ["out/training_args.bin"]


def test_a_stock_trainer_uploads_the_pruning_files_too(hub, plots, tmp_path, caplog):
    pruning = SparsityCallback(PruningConfig(**PRUNING))
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 5, "hub_always_push": True}
    trainer = make(tmp_path / "out", Trainer, callbacks=[pruning], hub_strategy="every_save", **options)
    trainer.train()
    assert hub.repos[REPO].files.keys() == MODEL | PRUNING_FILES | FIGURES
    assert hub.repos[REPO].files["pruning_report.json"] == (tmp_path / "out/pruning_report.json").read_bytes()
    assert "use SparseTrainer" not in caplog.text
    make(tmp_path / "out", Trainer, callbacks=[pruning], hub_strategy="checkpoint", **options).train()
    assert "a stock Trainer uploads checkpoints before their masks are written: use SparseTrainer" in caplog.text
