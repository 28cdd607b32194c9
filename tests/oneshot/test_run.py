"""One-shot pruning from checkpoint to checkpoint: its output, atomic writes, and continuing after a kill."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from helpers.tiny_texts import bert_tokenizer, classifier, llama, save, texts, word_tokenizer, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_sparse import OneshotConfig, ResumeError, calibration_batches, prune_oneshot
from hf_sparse.hub.card import SparsityCard
from hf_sparse.oneshot import OneshotArguments, run_oneshot
from hf_sparse.oneshot import run as run_module
from hf_sparse.oneshot.resume import FinishedSubgraphs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    lines = [{"text": text} for text in texts(200)]
    sentences = [{"sentence": text, "label": number % 2} for number, text in enumerate(texts(40))]
    return {
        "llama": save(folder / "llama", llama(), word_tokenizer()),
        "bert": save(folder / "bert", classifier(), bert_tokenizer()),
        "texts": write_rows(folder / "texts.jsonl", lines[:150]),
        "held_out": write_rows(folder / "held_out.jsonl", lines[150:]),
        "sentences": write_rows(folder / "sentences.jsonl", sentences),
    }


@pytest.fixture
def run(inputs, tmp_path):
    """Prunes the tiny Llama and returns the printed lines, which are in `run.lines` as well."""

    def run_it(options=None, **given):
        defaults = {"calibration_file": inputs["texts"], "samples": 8, "length": 16, "batch_size": 4, "device": "cpu"}
        run_it.lines = lines = []
        names = {"model_name_or_path": inputs["llama"], "output_dir": str(tmp_path / "out")}
        run_oneshot(
            OneshotArguments(**names | defaults | given),
            OneshotConfig(**options or {"target_sparsity": 0.5}),
            lines.append,
        )
        return "\n".join(lines)

    return run_it


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_output_is_a_plain_checkpoint_with_report_results_and_card(run, inputs, tmp_path):
    printed = run(eval=True, validation_file=inputs["held_out"])
    out = tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # The same in Python.
    model = AutoModelForCausalLM.from_pretrained(inputs["llama"])
    rows = [json.loads(line)["text"] for line in open(inputs["texts"])]
    batches = calibration_batches(rows, word_tokenizer(), model, length=16, samples=8, batch_size=4)
    report = prune_oneshot(model, batches, OneshotConfig(target_sparsity=0.5), progress=False)
    assert same(AutoModelForCausalLM.from_pretrained(out).state_dict(), model.state_dict())
    stored = json.loads((out / "pruning_report.json").read_text())
    assert stored["selected_zeros"] == report.zeros == report.selected // 2
    assert OneshotConfig.from_file(out / "pruning_config.json").target_sparsity == 0.5
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("good film")["input_ids"] == [1, 2, 4] and tokenizer.pad_token is None
    results = json.loads((out / "oneshot_results.json").read_text())
    assert results["calibration"] == {
        "data": "texts.jsonl",  # without the folder
        "samples": 8,
        "unit": "blocks",
        "length": 16,
        "seed": 0,
        "tokens": 8 * 16,
    }
    assert 1 < results["dense_perplexity"] != results["eval_perplexity"] > 1
    assert (
        "calibration data: 8 blocks of 16 tokens" in printed
        and f"after pruning:  loss {results['eval_loss']:,.4g}" in printed
    )
    card = SparsityCard.load(out)
    assert card.oneshot and card.dense_metrics == {
        "eval_loss": results["dense_loss"],
        "eval_perplexity": results["dense_perplexity"],
    }
    assert "8 blocks of 16 tokens from" in (out / "README.md").read_text()


def test_a_classifier(run, inputs, tmp_path):
    options = {"criterion": "taylor", "target_sparsity": 0.5, "scope": "layer"}
    files = {"calibration_file": inputs["sentences"], "validation_file": inputs["sentences"]}
    printed = run(options, model_name_or_path=inputs["bert"], eval=True, **files)
    assert "8 rows of at most 16 tokens" in printed and "after pruning:  accuracy" in printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    zeros = sum(int((model.state_dict()[layer["name"]] == 0).sum()) for layer in report["layers"])
    assert zeros == report["selected_zeros"] == report["selected_weights"] // 2


def test_rows_of_different_lengths_pass_through_in_one_batch(run, inputs):
    options = {"target_sparsity": 0.5, "forwards": 1}
    assert "saved to" in run(options, model_name_or_path=inputs["bert"], calibration_file=inputs["sentences"])


def test_magnitude_needs_no_texts(run, tmp_path):
    defaults = {"samples": 128, "length": 512, "batch_size": 8}
    options = {"target_sparsity": 0.5, "criterion": "magnitude"}
    assert "alibration" not in run(options, calibration_file=None, **defaults)
    assert "The calibration data are not read: no method that was chosen needs any." in run(options, overwrite=True)
    assert "Calibration data" not in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "oneshot_results.json").read_text())["calibration"] is None
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_dtype(run, tmp_path):
    run(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_offloading_to_disk_has_no_effect(run, inputs, tmp_path):
    run(output_dir=str(tmp_path / "whole"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    run(device=None, device_map=json.dumps(places), offload_folder=str(tmp_path / "offload"))
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_dry_run_writes_nothing(run, tmp_path):
    printed = run(dry_run=True, output_dir=None)
    assert "layers: 21 with 7,680 weights; blocks: 3; calibration tokens: 128" in printed and "time: about" in printed
    assert run(dry_run=True).startswith("loading") and not any(tmp_path.iterdir())


# Interruptions

KILLED = """
import os, signal, sys
from hf_sparse.oneshot import OneshotArguments, OneshotConfig, run_oneshot
from hf_sparse.oneshot.resume import FinishedSubgraphs

write = FinishedSubgraphs.write

def write_and_die(self, number, weights, errors):
    write(self, number, weights, errors)
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)

FinishedSubgraphs.write = write_and_die
model, texts, held_out, out = sys.argv[1:]
arguments = OneshotArguments(
    model, out, calibration_file=texts, samples=8, length=16, batch_size=4, device="cpu", eval=True,
    validation_file=held_out,
)
run_oneshot(arguments, OneshotConfig(target_sparsity=0.5, solver="sparsegpt"))
"""


def test_a_killed_run_continues(run, inputs, tmp_path, monkeypatch):
    options = {"target_sparsity": 0.5, "solver": "sparsegpt"}
    run(options, output_dir=str(tmp_path / "whole"))
    words = [inputs["llama"], inputs["texts"], inputs["held_out"], str(tmp_path / "out")]
    command = [sys.executable, "-c", KILLED, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    state = tmp_path / "out.unfinished"
    assert not (tmp_path / "out").exists() and (state / "stage-00001.safetensors").is_file()

    measured, written = [], []
    measure, write = run_module.evaluate_model, FinishedSubgraphs.write
    monkeypatch.setattr(run_module, "evaluate_model", lambda *args: measured.append(1) or measure(*args))
    monkeypatch.setattr(FinishedSubgraphs, "write", lambda self, n, *rest: written.append(n) or write(self, n, *rest))
    printed = run(options, eval=True, validation_file=inputs["held_out"])
    assert f"continuing: finished blocks in {state}: 2." in printed
    assert written == [2] and len(measured) == 1  # the metrics of the dense model were stored
    assert "before pruning: loss" in printed
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_ctrl_c_prints_how_to_continue(run, tmp_path, monkeypatch, capsys):
    write = FinishedSubgraphs.write

    def interrupted(self, subgraph, *rest):
        write(self, subgraph, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(FinishedSubgraphs, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.lines[-1].startswith(
        f"interrupted: finished blocks in {tmp_path / 'out'}.unfinished: 1. Run the same command again"
    )


def test_blocks_of_another_run_are_refused(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_folder_atomically", fails)
        with pytest.raises(OSError, match="the disk is full"):
            run()
    with pytest.raises(ResumeError, match=r"another model, config or calibration data.* remove .*out\.unfinished"):
        run({"target_sparsity": 0.6})
    assert "out.unfinished: 3." in run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def fails(*args):
    raise OSError("the disk is full")


def test_a_failed_write_leaves_the_old_output(run, tmp_path, monkeypatch):
    run()
    before = weights(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("hf_sparse.oneshot.run.write_card", fails)  # when the weights are written
        with pytest.raises(OSError, match="the disk is full"):
            run({"target_sparsity": 0.75}, overwrite=True)
    assert same(weights(tmp_path / "out"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.unfinished"]
    run({"target_sparsity": 0.75}, overwrite=True)
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["sparsity_of_selected"] == 0.75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# Refusals


def test_a_folder_that_is_not_empty_is_not_replaced(run, inputs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run()  # an empty one will do
    with pytest.raises(FileExistsError, match="out is not empty: name another folder, or pass `overwrite=True`"):
        run()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"holds no model \(config.json\), so it is not replaced"):
        run(output_dir=str(tmp_path / "home"), overwrite=True)
    with pytest.raises(NotADirectoryError, match="letter.txt is a file"):
        run(output_dir=str(tmp_path / "home" / "letter.txt"))
    with pytest.raises(FileExistsError, match="is the model to prune"):
        run(model_name_or_path=str(out), overwrite=True)


def test_errors_are_raised_before_a_model_is_loaded(run, inputs, monkeypatch):
    monkeypatch.setattr(run_module, "load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    for given, error, text in (
        ({"calibration_file": "no.txt"}, FileNotFoundError, 'calibration file "no.txt" does not exist'),
        (
            {"calibration_file": None, "samples": 128, "length": 512, "batch_size": 8},
            ValueError,
            '`criterion` "wanda" needs calibration data: pass `calibration_file` or',
        ),
        (
            {"calibration_file": None},
            ValueError,
            "^`samples` has no effect without `calibration_file` or `dataset_name`: give",
        ),
        ({"eval": True}, ValueError, "`eval` needs texts: pass `validation_file`, or `dataset_name`"),
        ({"eval": True, "validation_file": "no.txt"}, FileNotFoundError, 'validation file "no.txt" does not exist'),
        ({"dataset_name": "x"}, ValueError, "`calibration_file` and `dataset_name` exclude each other"),
        ({"device_map": "auto"}, ValueError, "`device` and `device_map` exclude each other"),
        ({"dtype": "int8"}, ValueError, '`dtype` is "int8": it must be one of auto, bfloat16'),
        ({"output_dir": None}, ValueError, "missing output folder"),
        ({"model_name_or_path": None}, ValueError, "missing model"),
    ):
        with pytest.raises(error, match=text):
            run(**given)


def test_errors_of_models_tokenizers_and_device_maps(run, inputs, tmp_path):
    with pytest.raises(OSError, match='there is no folder "/no/model".'):
        run(model_name_or_path="/no/model")
    llama().save_pretrained(tmp_path / "mute")
    with pytest.raises(OSError, match='(?s)mute" has no tokenizer .* name one with `tokenizer_name`'):
        run(model_name_or_path=str(tmp_path / "mute"))
    assert "saved" in run(model_name_or_path=str(tmp_path / "mute"), tokenizer_name=inputs["llama"])
    with pytest.raises(ValueError, match="`device_map` is not a JSON object"):
        run(device=None, device_map="{layers", output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="`length` 33 is beyond the model's 32 positions"):
        run(length=33, output_dir=str(tmp_path / "other"))
