"""Options of methods decide whole runs, and the files of a run have them."""

import json

import pytest
import torch
from helpers.tiny import SCHEDULE, bert, make, same, weights
from helpers.tiny_texts import WORDS, llama, save, texts, word_tokenizer, write_rows

from hf_sparse import OneshotConfig, PruningConfig, SparsityReport, prune_oneshot
from hf_sparse.allocations.owl import OWL
from hf_sparse.cli.app import app
from hf_sparse.criteria.snip_momentum import SnipMomentum
from hf_sparse.files import CARD_FILE, CONFIG_FILE, REPORT_FILE
from hf_sparse.solvers.sparsegpt import SparseGPT


def test_decay_in_training(tmp_path):
    """0.9 is the default; with another decay other weights are pruned."""
    masks = {}
    for name, criterion in {"default": "snip_momentum", "0.9": SnipMomentum(0.9), "0.95": SnipMomentum(0.95)}.items():
        trainer = make(tmp_path / name, target_sparsity=0.5, criterion=criterion, **SCHEDULE)
        trainer.train()
        masks[name] = {name: weight == 0 for name, weight in weights(trainer.model).items()}
    assert same(masks["default"], masks["0.9"]) and not same(masks["0.9"], masks["0.95"])
    trainer.save_model()
    trainer.create_model_card()
    config = PruningConfig.from_file(tmp_path / "0.95" / CONFIG_FILE)
    assert (config.criterion, config.criterion_kwargs) == ("snip_momentum", {"decay": 0.95})
    (settings,) = json.loads((tmp_path / "0.95" / CARD_FILE).read_text())["settings"]
    assert settings["criterion_kwargs"] == {"decay": 0.95} and settings["allocation"] == "uniform"
    assert "snip_momentum (decay=0.95)" in (tmp_path / "0.95" / "README.md").read_text()


def test_a_resumed_run_refuses_other_options(tmp_path):
    options = {"target_sparsity": 0.5, "save_strategy": "steps", "save_steps": 4, **SCHEDULE}
    make(tmp_path, criterion=SnipMomentum(0.95), **options).train()
    for criterion in (SnipMomentum(0.5), "snip_momentum"):
        resumed = make(tmp_path, model=bert(seed=9), criterion=criterion, **options)
        with pytest.raises(ValueError, match=r"`criterion_kwargs`: \{'decay': 0.95\} -> "):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def pruned_llama(**options):
    model = llama()
    batches = [
        {"input_ids": torch.randint(len(WORDS), (4, 16), generator=torch.Generator().manual_seed(n))} for n in (0, 1)
    ]
    config = OneshotConfig(target_sparsity=0.5, **options)
    return model, prune_oneshot(model, batches, config, progress=False)


def largest_distance(report):
    return max(abs(layer.sparsity - 0.5) for layer in report.layers)


def test_options_of_owl():
    reports = {
        allocation: pruned_llama(allocation=allocation)[1] for allocation in (OWL(), OWL(lambda_=0.2), OWL(m=2))
    }
    assert [round(largest_distance(report), 2) for report in reports.values()] == [0.08, 0.2, 0.08]
    sparsities = {tuple(layer.sparsity for layer in report.layers) for report in reports.values()}
    assert len(sparsities) == 3


def test_options_of_sparsegpt():
    solvers = (SparseGPT(), SparseGPT(0.01, None), SparseGPT(dampening=0.5), SparseGPT(block_size=4))
    default, same_as_default, *others = (weights(pruned_llama(solver=solver)[0]) for solver in solvers)
    assert same(default, same_as_default)
    assert not any(same(default, other) for other in others) and not same(*others)
    masks = [{name: weight != 0 for name, weight in run.items()} for run in (default, *others)]
    assert not same(masks[0], masks[2])


def test_options_on_the_command_line_and_in_all_files(tmp_path, capsys):
    model = save(tmp_path / "model", llama(), word_tokenizer())
    calibration = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts(60)])
    words = ["prune", model, tmp_path / "out", "--target-sparsity", 0.5, "--calibration-file", calibration]
    words += ["--samples", 8, "--length", 16, "--criterion", "wanda", "--solver", "sparsegpt"]
    words += ["--solver-kwargs", '{"dampening": 0.1, "block_size": 4}']
    words += ["--allocation", "owl", "--allocation_kwargs", '{"lambda_": 0.2}']
    with pytest.raises(SystemExit) as done:
        app([*map(str, words)], prog_name="hf-sparse")
    assert done.value.code == 0, capsys.readouterr().err
    out = tmp_path / "out"
    config = OneshotConfig.from_file(out / CONFIG_FILE)
    expected = OneshotConfig(
        target_sparsity=0.5, criterion="wanda", solver=SparseGPT(0.1, 4), allocation=OWL(lambda_=0.2)
    )
    assert config == expected
    (settings,) = json.loads((out / CARD_FILE).read_text())["settings"]
    assert settings["solver_kwargs"] == {"dampening": 0.1, "block_size": 4}
    assert settings["allocation_kwargs"] == {"lambda_": 0.2} and "criterion_kwargs" not in settings
    assert round(largest_distance(SparsityReport.load(out / REPORT_FILE)), 2) == 0.2
    card = (out / "README.md").read_text()
    assert "owl (lambda\\_=0.2)" in card and "sparsegpt (dampening=0.1, block_size=4)" in card


def test_a_criterion_of_positions_needs_no_calibration_data(tmp_path, capsys):
    model = save(tmp_path / "model", llama(), word_tokenizer())
    with pytest.raises(SystemExit) as done:
        app(["prune", model, str(tmp_path / "out"), "--criterion", "random", "--target-sparsity", ".5"])
    assert done.value.code == 0, capsys.readouterr().err
    assert SparsityReport.load(tmp_path / "out" / REPORT_FILE).sparsity == 0.5
