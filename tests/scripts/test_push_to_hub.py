"""--push_to_hub of the scripts: the uploaded files, and the exit code if the upload fails."""

import pytest
import run_glue
from helpers.hub_server import TOKEN, USER
from helpers.scripts import read_json, sentiment_rows, train_args, write_rows
from safetensors.torch import load
from transformers import AutoModelForSequenceClassification


REPO = f"{USER}/pruned"


@pytest.fixture
def run(hub, tiny_bert, tmp_path):
    """Runs run_glue.py on a few rows, which are evaluated after the model is saved."""

    def run():
        rows = [write_rows(tmp_path / name, sentiment_rows(12)) for name in ("train.csv", "dev.csv")]
        options = {"task_name": "sst2", "train_file": rows[0], "validation_file": rows[1], "max_seq_length": 16}
        options |= {"model_name_or_path": tiny_bert, "target_sparsity": 0.5, "hub_model_id": REPO, "hub_token": TOKEN}
        run_glue.main([*train_args(tmp_path / "out", **options), "--do_train", "--do_eval", "--push_to_hub"])

    return run


def test_a_script_uploads_model_card_and_results(run, hub, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    run()
    files = hub.repos[REPO].files
    expected = {"README.md", "model.safetensors", "tokenizer.json", "eval_results.json", "pruning_report.json"}
    assert expected <= files.keys()
    weights = load(files["model.safetensors"])
    report = read_json(tmp_path / "out" / "pruning_report.json")
    zeros = sum(int((weights[layer["name"]] == 0).sum()) for layer in report["layers"])
    assert zeros == report["selected_zeros"] == report["selected_weights"] // 2
    said = "".join(capfd.readouterr())
    assert TOKEN not in said
    assert not [name for name, data in files.items() if TOKEN.encode() in data]
    local = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in local if TOKEN.encode() in path.read_bytes()]


def test_a_script_that_cannot_upload_finishes_its_work_and_fails(run, hub, tmp_path):
    """The exit code reports a failed upload."""
    hub.fail("/commit/", 403)
    with pytest.raises(SystemExit) as ended:
        run()
    assert str(ended.value).endswith(f"hf-sparse push {tmp_path / 'out'} {REPO}")
    assert isinstance(ended.value.code, str), "which Python prints, to end with 1"
    assert read_json(tmp_path / "out" / "eval_results.json")["eval_samples"] == 12
    assert (tmp_path / "out" / "README.md").is_file()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
