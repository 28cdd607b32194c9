"""On several ranks the main one uploads, once, and all raise if it cannot."""

from pathlib import Path

import pytest
from helpers.hub_server import READ_TOKEN, TOKEN, USER
from helpers.masks import read_masks
from helpers.modes import mode_params
from helpers.tiny import SCHEDULE, same
from huggingface_hub import snapshot_download
from safetensors.torch import load


OPTIONS = {"target_sparsity": 0.5, "criterion": "magnitude", **SCHEDULE, "push_to_hub": True}
OPTIONS |= {"hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 10, "report_to": "none"}
MAIN, OTHER = 0, 1


@pytest.mark.parametrize("mode", mode_params("ddp", "fsdp2"))
def test_one_rank_uploads(ranks, hub, tmp_path, mode):
    options = OPTIONS | {"hub_token": TOKEN, "hub_model_id": "pruned"}
    run = ranks.run(mode, f"{mode}-push", output_dir=tmp_path / "out", options=options, hub=hub.url, push=True)
    repo = hub.repos[f"{USER}/pruned"]
    step = "Training in progress, step 10"
    assert [message for message, _ in repo.commits] == [step, f"{step}, checkpoint", "End of training"]
    assert len(hub.asked("/repos/create")) == 1
    assert run.ranks[MAIN]["pushed"].startswith(hub.url) and run.ranks[OTHER]["pushed"] == "None"
    assert same(load(repo.files["model.safetensors"]), run.weights)
    assert {"README.md", "pruning_config.json", "pruning_report.json"} <= repo.files.keys()

    there = Path(snapshot_download(f"{USER}/pruned", allow_patterns="last-checkpoint/*")) / "last-checkpoint"
    assert len(list(there.glob("pruning_state*"))) == (1 if mode == "ddp" else 2)
    for name, mask in read_masks(there):
        assert not run.weights[name][~mask].any()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_all_ranks_raise_if_the_main_one_cannot_upload(ranks, hub, tmp_path):
    options = OPTIONS | {"hub_token": READ_TOKEN, "hub_model_id": "pruned"}
    run = ranks.run("ddp", "ddp-no-push", fails=True, output_dir=tmp_path / "out", options=options, hub=hub.url)
    assert run.exits == [1, 1], run.log
    assert (
        "UploadError: pruned could not be created or reached on the Hub. The token has no write permission" in run.log
    )
    assert "another process stopped with an error" in run.log


@pytest.mark.parametrize("mode", mode_params("fsdp2"))
def test_push_by_method(ranks, hub, tmp_path, mode):
    """The main rank creates the repository, and all ranks take part in saving sharded weights."""
    options = {name: value for name, value in OPTIONS.items() if not name.startswith(("push", "hub", "save"))}
    options |= {"hub_token": TOKEN}
    run = ranks.run(mode, f"{mode}-by-method", output_dir=tmp_path / "out", options=options, hub=hub.url, push=True)
    repo = hub.repos[f"{USER}/out"]
    assert len(hub.asked("/repos/create")) == len(repo.commits) == 1
    assert same(load(repo.files["model.safetensors"]), run.weights)
