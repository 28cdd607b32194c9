"""Interrupted runs that continue: the same weights, bit for bit; and files that are refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.tiny import same, weights
from safetensors.torch import load_file

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse import files as storage
from hf_sparse.oneshot import ResumeError
from hf_sparse.oneshot.layerwise import LayerPruner
from hf_sparse.oneshot.resume import FinishedSubgraphs, remove_finished_subgraphs, run_digest


HERE = Path(__file__).parent
# With the pooler, whose subgraph comes after the blocks.
OPTIONS = {"target_sparsity": 0.5, "solver": "sparsegpt", "targets": ["all-body"]}


def run(name, folder=None, model=None, batches=None, **options):
    architecture = ARCHITECTURES[name]
    model = model or architecture.model()
    batches = batches or architecture.batches()
    report = prune_oneshot(model, batches, OneshotConfig(**OPTIONS | options), folder, progress=False)
    return weights(model), report


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


class _Cut:
    """Raises KeyboardInterrupt at the call number `at` of a function, before or after it."""

    def __init__(self, real, at, after=False):
        self.real, self.left, self.after = real, at, after

    def __get__(self, owner, kind=None):
        return lambda *args, **kwargs: self(owner, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.real(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("options", [{}, {"forwards": 1}, {"allocation": "owl", "criterion": "wanda"}], ids=str)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_run_continues_after_the_last_finished_subgraph(name, options, monkeypatch, tmp_path):
    expected, report = run(name, **options)
    subgraphs = {"bert": 3, "t5": 4}[name]
    for finished in range(1, subgraphs + 1):
        folder = tmp_path / str(finished)
        with monkeypatch.context() as patch:
            patch.setattr(FinishedSubgraphs, "write", _Cut(FinishedSubgraphs.write, finished, after=True))
            with pytest.raises(KeyboardInterrupt):
                run(name, folder, **options)
        assert files_in(folder) == [f"stage-{number:05d}.safetensors" for number in range(finished)]
        with monkeypatch.context() as patch:  # finished subgraphs are not pruned again
            solved = []
            real = LayerPruner.prune_layers
            patch.setattr(LayerPruner, "prune_layers", lambda *args: solved.append(args) or real(*args))
            found, again = run(name, folder, **options)
            assert bool(solved) == (finished < subgraphs)
        assert same(found, expected) and again == report
        assert same(run(name, folder, **options)[0], expected), "from all subgraphs"


def test_interrupted_while_a_file_is_written(monkeypatch, tmp_path):
    """A file is never partly written under its name."""
    expected, _ = run("bert")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", _Cut(storage.save_file, 2, after=True))
        with pytest.raises(KeyboardInterrupt):
            run("bert", tmp_path)
    assert files_in(tmp_path) == ["stage-00000.safetensors"]
    assert same(run("bert", tmp_path)[0], expected)


def test_killed(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"}
    command = [sys.executable, str(HERE / "cut_off_worker.py"), str(tmp_path / "state"), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert len(files_in(tmp_path / "state")) == 2
    assert same(run("bert", tmp_path / "state")[0], run("bert")[0])


@pytest.fixture
def cut_off(tmp_path, monkeypatch):
    """The folder of a run that finished one subgraph."""
    with monkeypatch.context() as patch:
        patch.setattr(FinishedSubgraphs, "write", _Cut(FinishedSubgraphs.write, 1, after=True))
        with pytest.raises(KeyboardInterrupt):
            run("bert", tmp_path)
    return tmp_path


def test_another_run_is_refused_before_anything_is_changed(cut_off):
    architecture = ARCHITECTURES["bert"]
    batches = architecture.batches()
    flat = [{name: tensor.reshape(1, -1) for name, tensor in batch.items()} for batch in batches]
    renamed = [{"input_ids": batch["input_ids"], "token_type_ids": batch["attention_mask"]} for batch in batches]
    other = architecture.model()
    other.bert.encoder.layer[1].output.dense.weight.data[0, 0] += 1e-6
    for changes in (
        {"target_sparsity": 0.6},
        {"solver_kwargs": {"dampening": 0.02}},
        {"solver_kwargs": {"block_size": 8}},
        {"exclude": ["*.query"]},
        {"batches": batches[::-1]},
        {"batches": batches[:-1]},
        {"batches": flat[:3]},
        {"batches": renamed},
        {"model": other},
        {"model": architecture.model().to(torch.bfloat16)},
    ):
        model = changes.pop("model", architecture.model())
        before = weights(model)
        with pytest.raises(ResumeError, match="was written by a run with another model, config or calibration data"):
            run("bert", cut_off, model=model, **changes)
        assert same(weights(model), before)
    assert same(run("bert", cut_off)[0], run("bert")[0])


@pytest.mark.parametrize("damage", ["cut short", "empty", "foreign", "no identity"])
def test_a_damaged_file_is_refused_by_name(cut_off, damage):
    path = cut_off / "stage-00000.safetensors"
    if damage == "foreign":
        path.write_text("not tensors")
    elif damage == "no identity":
        storage.write_tensors(path, load_file(path), {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[: -8 if damage == "cut short" else 0])
    with pytest.raises(ResumeError, match="stage-00000.safetensors is damaged or foreign: .* Remove it to start over"):
        run("bert", cut_off)
    path.unlink()
    assert same(run("bert", cut_off)[0], run("bert")[0])


def test_files_after_a_gap_are_not_used(cut_off):
    """The weights of a subgraph depend on the outputs of those before it."""
    run("bert", cut_off)
    (cut_off / "stage-00001.safetensors").unlink()
    assert FinishedSubgraphs(cut_off, _digest()).count == 1
    assert same(run("bert", cut_off)[0], run("bert")[0])


def _digest():
    architecture = ARCHITECTURES["bert"]
    config = OneshotConfig(**OPTIONS).to_dict()
    return run_digest(config, architecture.model().named_parameters(), architecture.batches())


def test_removing_leaves_other_files(tmp_path):
    subgraphs = FinishedSubgraphs(tmp_path / "state", "me")
    assert subgraphs.count == 0 and not (tmp_path / "state").exists()
    remove_finished_subgraphs(tmp_path / "state")
    for number in range(2):
        subgraphs.write(number, {"w": torch.ones(2, 2)}, {"w": 0.25})
    again = FinishedSubgraphs(tmp_path / "state", "me")
    assert (
        again.count == 2 and again.read(1)[1] == {"w": 0.25} and torch.equal(again.read(1)[0]["w"], torch.ones(2, 2))
    )
    (tmp_path / "state" / "mine.txt").write_text("keep")
    (tmp_path / "state" / ".stage-00002-x1y2.safetensors").write_text("what a killed process leaves")
    remove_finished_subgraphs(tmp_path / "state")
    assert files_in(tmp_path / "state") == ["mine.txt"]
    (tmp_path / "state" / "mine.txt").unlink()
    subgraphs.write(0, {}, {})
    remove_finished_subgraphs(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_only_the_main_process_writes(tmp_path):
    other = FinishedSubgraphs(tmp_path / "state", "me", is_main=False)
    other.write(0, {"w": torch.ones(1)}, {})
    assert not (tmp_path / "state").exists()


def test_run_digest():
    """Equal for equal runs, different for any other."""
    batch, weight = {"ids": torch.tensor([[1, 2], [3, 4]])}, ("w", torch.arange(1000.0))
    first = run_digest({"a": 1, "b": None}, [weight], [batch])
    assert first == run_digest({"b": None, "a": 1}, [weight], [dict(batch)])
    others = [
        run_digest({"a": 2, "b": None}, [weight], [batch]),
        run_digest({"a": 1, "b": None}, [("v", weight[1])], [batch]),
        run_digest({"a": 1, "b": None}, [("w", weight[1].view(10, 100))], [batch]),
        run_digest({"a": 1, "b": None}, [("w", weight[1].half())], [batch]),
        run_digest({"a": 1, "b": None}, [weight], [{"ids": batch["ids"].view(1, 4)}]),
        run_digest({"a": 1, "b": None}, [weight], [{"other": batch["ids"]}]),
        run_digest({"a": 1, "b": None}, [weight], [batch["ids"]]),
        run_digest({"a": 1, "b": None}, [weight], [{"ids": batch["ids"].int()}]),
        run_digest({"a": 1, "b": None}, [weight], [batch, batch]),
        run_digest({"a": 1, "b": None}, [weight], [batch | {"flag": True}]),
    ]
    assert len({first, *others}) == len(others) + 1
