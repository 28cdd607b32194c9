"""A run that is cut off anywhere and resumed ends bitwise equal to one that is not; what does not fit is refused.

"Cut off" is SIGKILL: the runs that are killed are processes of their own.
"""

import collections
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny import SCHEDULE, STEPS, bert, content, gpt2, make, same, weights
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

import hf_sparse.engine.pruner
import hf_sparse.files
from hf_sparse import PruningConfig, Requires, SparsityCallback
from hf_sparse.config.distillation import DistillationOptions
from hf_sparse.criteria import CRITERIA
from hf_sparse.files import STATE_FILE
from hf_sparse.training import callback, checkpoint_search, resume, trainer
from hf_sparse.training.checkpoint_search import newest_complete_checkpoint
from hf_sparse.training.resume import CheckpointError, ResumeState
from hf_sparse.training.state_files import IN_STEPS, changed_options, compared_options


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
LAST = f"checkpoint-{STEPS}"
# Before, inside (right after a prune step) and after the schedule, whose prune steps are 3, 5, 7 and 8.
RESUMED_AT = (1, 5, 9)

METHODS = {name: {"criterion": name} for name in CRITERIA.names() if not CRITERIA[name].requires & Requires.INPUTS} | {
    "granet": {"criterion": "snip_momentum", "algorithm": "granet"},
    "set": {"algorithm": "set", "algorithm_kwargs": {"initial_mask": "random"}, "allocation": "erdos_renyi"},
    "rigl_n_of_m": {"algorithm": "rigl", "pattern": "2:4"},
    "acdc": {"algorithm": "acdc", "pattern": "4x1"},
    "movement": {"algorithm": "movement"},
    "soft_movement": {"algorithm": "soft_movement", "algorithm_kwargs": {"threshold": 0.52}, "scope": "row"},
    "sr_ste": {"algorithm": "sr_ste", "pattern": "2:4"},
    "rows": {"scope": "row", "criterion": "taylor"},
    "erdos_renyi": {"allocation": "erdos_renyi", "criterion": "greedy_movement"},
    "blocks": {"pattern": "4x1", "criterion": "snip_momentum"},
    "channels": {"pattern": "channel", "criterion": "snip"},
    "n_of_m": {"pattern": "2:4", "criterion": "gradient"},
    "optimizer": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "criterion": "greedy_movement"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, method):
    options = {"target_sparsity": 0.5, **SCHEDULE, **EVERY_STEP, **METHODS[method]}
    make(tmp_path / "whole", **options).train()
    expected = content(tmp_path / "whole" / LAST)
    for step in RESUMED_AT:
        resumed = make(tmp_path / f"from{step}", model=bert(seed=99), **options | {"save_steps": STEPS})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert content(tmp_path / f"from{step}" / LAST) == expected, step


def test_resume_with_accumulation_evaluation_and_a_model_of_conv1d(tmp_path):
    options = {"target_sparsity": 0.7, "criterion": "snip_momentum", **SCHEDULE, **EVERY_STEP}
    options |= {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    whole = make(tmp_path / "a", model=gpt2(), **options)
    whole.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    resumed = make(tmp_path / "b", model=gpt2(seed=5), **options)
    resumed.train(True)
    assert content(tmp_path / "b" / LAST) == content(tmp_path / "a" / LAST)
    assert same(weights(resumed.model), weights(whole.model))
    assert resumed.state.best_global_step == whole.state.best_global_step


def test_a_stock_trainer_with_the_callback_resumes_too(tmp_path):
    config = PruningConfig(target_sparsity=0.5, criterion="greedy_movement", **SCHEDULE)
    for folder, kwargs in (("whole", {}), ("resumed", {"resume_from_checkpoint": True})):
        if folder == "resumed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
        make(tmp_path / folder, Trainer, callbacks=[SparsityCallback(config)], **EVERY_STEP).train(**kwargs)
    assert content(tmp_path / "resumed" / LAST) == content(tmp_path / "whole" / LAST)


# Read once


class Calls:
    """Counts calls of functions while it is on."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.counts, self.is_on = monkeypatch, collections.Counter(), True

    def count(self, key, owner, name, counted=lambda *args: True):
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            self.counts[key] += self.is_on and counted(*args)
            return function(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, wrapper)


class StopsCounting(TrainerCallback):
    """Once training has begun, state files are opened and checksums computed to write checkpoints."""

    def __init__(self, calls):
        self.calls = calls

    def on_train_begin(self, *args, **kwargs):
        self.calls.is_on = False


@pytest.mark.parametrize("kind, resolved", [("sparse", 2), ("sparse, named", 2), ("stock", 1)])
def test_a_checkpoint_is_opened_and_verified_once(tmp_path, monkeypatch, kind, resolved):
    config = {"target_sparsity": 0.5, "criterion": "greedy_movement", **SCHEDULE}
    make(tmp_path, **config, **EVERY_STEP | {"save_steps": 4}).train()
    shutil.rmtree(tmp_path / LAST)
    if kind == "stock":
        run = make(tmp_path, Trainer, callbacks=[SparsityCallback(PruningConfig(**config))])
    else:
        run = make(tmp_path, **config)
    calls = Calls(monkeypatch)
    for module in (hf_sparse.files, checkpoint_search):
        calls.count("opened", module, "safe_open", lambda path: Path(path).name == STATE_FILE)
    calls.count("verified", resume, "checksum")
    for module in (hf_sparse.engine.pruner, trainer, callback):
        calls.count("groups resolved", module, "resolve_layers")
    run.add_callback(StopsCounting(calls))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8") if kind.endswith("named") else True)
    assert calls.counts == {"opened": 1, "verified": 1, "groups resolved": resolved}


def test_a_retry_of_the_training_loop_reads_nothing_again(tmp_path, monkeypatch):
    """As with auto_find_batch_size: on_train_begin comes twice, and the state is applied twice."""
    options = {"target_sparsity": 0.5, "criterion": "greedy_movement", **SCHEDULE, **EVERY_STEP}
    make(tmp_path, **options).train()

    class OutOfMemoryOnce(TrainerCallback):
        begun = 0

        def on_step_begin(self, *args, **kwargs):
            self.begun += 1
            if self.begun == 1:
                raise RuntimeError("CUDA out of memory.")

    calls = Calls(monkeypatch)
    calls.count("opened", hf_sparse.files, "safe_open", lambda path: Path(path).name == STATE_FILE)
    run = make(tmp_path, callbacks=[OutOfMemoryOnce()], auto_find_batch_size=True, **options | {"save_steps": STEPS})
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert calls.counts == {"opened": 1} and run.sparsity_callback.resume_state is None
    assert run.state.global_step == STEPS and run.resumed_from == str(tmp_path / "checkpoint-8")
    assert run.sparsity_callback.pruner.sparsity() == 0.5


def test_a_finished_run_is_not_trained_further(tmp_path):
    """With max_steps inside an epoch: stock Trainer takes a step before it compares with max_steps."""
    options = {"target_sparsity": 0.5, "criterion": "greedy_movement", **SCHEDULE, "save_strategy": "epoch"}
    options |= {"eval_strategy": "epoch", "load_best_model_at_end": True}
    finished = make(tmp_path, **options)
    finished.train()
    before = content(tmp_path / LAST), (tmp_path / LAST / "trainer_state.json").stat().st_mtime_ns
    steps = _Steps()
    resumed = make(tmp_path, model=bert(seed=9), callbacks=[steps], **options)
    result = resumed.train(resume_from_checkpoint=True)
    assert not steps.taken and result.global_step == resumed.state.global_step == STEPS
    assert Path(resumed.resumed_from).name == LAST and same(weights(resumed.model), weights(finished.model))
    assert before == (content(tmp_path / LAST), (tmp_path / LAST / "trainer_state.json").stat().st_mtime_ns)
    steps.taken = False
    resumed.train()  # anew
    assert steps.taken and resumed.state.global_step == STEPS


def test_a_stock_trainer_warns_that_it_trains_a_finished_run_further(tmp_path, caplog):
    config = PruningConfig(target_sparsity=0.5, criterion="greedy_movement", **SCHEDULE)
    for again in (None, True):
        assert "may train one more step" not in caplog.text
        stock = make(tmp_path, Trainer, callbacks=[SparsityCallback(config)], **EVERY_STEP)
        stock.train(resume_from_checkpoint=again)
    assert "may train one more step" in caplog.text


# Killed


KILL_OPTIONS = {"target_sparsity": 0.5, "criterion": "snip_momentum", **SCHEDULE, **EVERY_STEP}
TWO_KEPT = {"save_total_limit": 2}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_then_die(path):
    """What is left of a file when its writer is killed midway."""
    size = Path(path).stat().st_size
    with open(path, "rb+") as file:
        file.truncate(size // 2)
    die()


def _at(step: int, folder) -> bool:
    return f"checkpoint-{step}" in str(folder)


def killed_in_weights(step):
    save = transformers.PreTrainedModel.save_pretrained

    def patched(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        if _at(step, folder):
            half_then_die(Path(folder) / "model.safetensors")

    transformers.PreTrainedModel.save_pretrained = patched


def killed_before_weights(step):
    save = transformers.PreTrainedModel.save_pretrained

    def patched(self, folder, *args, **kwargs):
        return die() if _at(step, folder) else save(self, folder, *args, **kwargs)

    transformers.PreTrainedModel.save_pretrained = patched


def killed_in_optimizer(step):
    save = torch.save

    def patched(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if _at(step, file) and str(file).endswith("optimizer.pt"):
            half_then_die(file)

    torch.save = patched


def killed_before_rng(step):
    save = Trainer._save_rng_state

    def patched(self, folder):
        return die() if _at(step, folder) else save(self, folder)

    Trainer._save_rng_state = patched


def killed_in_state(step):
    save = transformers.TrainerState.save_to_json

    def patched(self, path):
        save(self, path)
        if _at(step, path):
            half_then_die(path)

    transformers.TrainerState.save_to_json = patched


def killed_in_masks(step):
    save = hf_sparse.files.save_file

    def patched(tensors, path, *args, **kwargs):
        save(tensors, path, *args, **kwargs)
        if _at(step, path):
            half_then_die(path)

    hf_sparse.files.save_file = patched


def killed_in_rotation(step):
    remove = shutil.rmtree

    def patched(folder, *args, **kwargs):
        if _at(step - 2, folder):
            (Path(folder) / "optimizer.pt").unlink()
            die()
        remove(folder, *args, **kwargs)

    shutil.rmtree = patched


KILLS = {
    killed_in_masks: 3,
    killed_before_weights: 3,
    killed_in_weights: 3,
    killed_in_optimizer: 3,
    killed_before_rng: 3,
    killed_in_state: 3,
    killed_in_rotation: 4,
}


class DiesAnywhere(TrainerCallback):
    """Dies a number of calls of functions after its second step has begun, wherever that is, and at the latest as the
    run's last step begins: a finished run cannot be killed again."""

    def __init__(self, calls: int):
        self.calls, self.begun = calls, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1
        if state.global_step == STEPS - 1:
            die()
        if self.begun == 2:  # the first imports a lot, and would be all that is ever interrupted
            sys.setprofile(self._count)

    def _count(self, frame, event, value):
        self.calls -= event in ("call", "c_call")
        if self.calls < 0:
            die()


def run(folder: str, options: dict, kill, resume: bool, callbacks=None) -> None:
    """A training run, in a process of its own; `kill(4)` arranges its death at the checkpoint of step 4."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    if kill is not None:
        kill(4)
    make(folder, model=bert(seed=3), callbacks=callbacks, **options).train(resume_from_checkpoint=resume)


@pytest.fixture(scope="module")
def processes():
    """Processes that start in no time, because what they are forked from has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_sparse", "transformers.models.bert.modeling_bert"])
    return context


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    make(folder, model=bert(seed=3), **KILL_OPTIONS).train()
    return folder


def killed(process) -> bool:
    process.join(timeout=120)
    return process.exitcode == -signal.SIGKILL


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_killed_during_a_save(tmp_path, processes, uninterrupted, kill):
    options = KILL_OPTIONS | (TWO_KEPT if kill is killed_in_rotation else {})
    process = processes.Process(target=run, args=(str(tmp_path), options, kill, False))
    process.start()
    assert killed(process)
    resumed = make(tmp_path, model=bert(seed=4), **options)
    resumed.train(resume_from_checkpoint=True)
    assert Path(resumed.resumed_from).name == f"checkpoint-{KILLS[kill]}"
    assert content(tmp_path / LAST) == content(uninterrupted / LAST)
    assert leftovers(tmp_path) == []


def test_killed_again_and_again_anywhere(tmp_path, processes, uninterrupted):
    chance, options, reached = random.Random(0), KILL_OPTIONS | TWO_KEPT, []
    for start in range(5):
        calls = chance.randrange(60_000)  # a step and its checkpoint take 45,000
        arguments = str(tmp_path), options, None, start > 0, [DiesAnywhere(calls)]
        process = processes.Process(target=run, args=arguments)
        process.start()
        assert killed(process)
        reached.append(newest_complete_checkpoint(tmp_path).checkpoint.name)
    assert len(set(reached)) > 1 and LAST not in reached
    make(tmp_path, model=bert(seed=3), **options).train(resume_from_checkpoint=True)
    assert content(tmp_path / LAST) == content(uninterrupted / LAST)


def test_a_state_of_an_earlier_run_does_not_vouch_for_a_half_written_checkpoint(tmp_path, processes, uninterrupted):
    make(tmp_path, model=bert(seed=8), **KILL_OPTIONS | {"max_steps": 4, "prune_end": 4}).train()
    process = processes.Process(target=run, args=(str(tmp_path), KILL_OPTIONS, killed_before_rng, False))
    process.start()
    assert killed(process)
    assert (tmp_path / "checkpoint-4" / "rng_state.pth").is_file()  # the earlier run's
    make(tmp_path, model=bert(seed=4), **KILL_OPTIONS).train(resume_from_checkpoint=True)
    assert content(tmp_path / LAST) == content(uninterrupted / LAST)


def test_killed_before_the_first_checkpoint(tmp_path):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "checkpoint-1").mkdir()
    (tmp_path / "broken" / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1, "log_hi')
    for folder in ("empty", "broken"):
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            make(tmp_path / folder, **KILL_OPTIONS).train(resume_from_checkpoint=True)


# Refused


OPTIONS = {"target_sparsity": 0.5, "criterion": "snip_momentum", **SCHEDULE}
FRACTIONS = {"prune_start": 0.2, "prune_end": 0.8, "prune_every": 0.1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint at step 6, inside the schedule; copied before it is damaged."""
    folder = tmp_path_factory.mktemp("saved")
    make(folder, **OPTIONS, save_strategy="steps", save_steps=6).train()
    return folder / "checkpoint-6"


class _Steps(TrainerCallback):
    taken = False

    def on_step_begin(self, *args, **kwargs):
        self.taken = True


def refuse(tmp_path, checkpoint, message: str, early: bool = True, model=None, **changes) -> None:
    """Resuming is refused with `message` before any step; if `early`, before the model's weights are touched."""
    steps = _Steps()
    trainer = make(tmp_path / "resumed", model=model, callbacks=[steps], **OPTIONS | changes)
    before = weights(trainer.model)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not steps.taken
    assert same(weights(trainer.model), before if early else _loaded(checkpoint))
    assert not list((tmp_path / "resumed").glob("checkpoint-*"))


def _loaded(checkpoint) -> dict:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture
def copied(tmp_path, saved) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoint-6")


def test_missing_masks_are_refused(tmp_path, copied):
    (copied / STATE_FILE).unlink()
    refuse(tmp_path, copied, "holds no masks.*keep_zeros")


def test_truncated_masks_are_refused(tmp_path, copied):
    path = copied / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    refuse(tmp_path, copied, f"{STATE_FILE}: truncated")


@pytest.mark.parametrize("kind", ["mask", "stat"])
def test_one_flipped_bit_is_refused(tmp_path, copied, kind):
    tensors, metadata = hf_sparse.files.open_tensors(copied / STATE_FILE)
    tensors = dict(tensors)
    name = next(name for name in tensors if name.startswith(f"{kind}/"))
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, copied / STATE_FILE, metadata=metadata)
    refuse(tmp_path, copied, "not written by hf_sparse: its checksum")


def test_another_programs_file_is_refused(tmp_path, copied):
    save_file({"mask": torch.ones(3)}, copied / STATE_FILE)
    refuse(tmp_path, copied, "damaged or was not written by hf_sparse")


def test_masks_of_another_model_are_refused(tmp_path, copied):
    refuse(
        tmp_path,
        copied,
        r'other weights.*"bert.encoder.*saved \[24, 24\], selected \[32, 32\]',
        model=bert(hidden_size=32),
    )
    refuse(tmp_path, copied, r"saved None, selected \[24, 24\]", model=bert(num_hidden_layers=2))
    refuse(tmp_path, copied, r"1 differ.*query.*selected None", exclude=["*.query"])
    refuse(tmp_path, copied, r"1 differ.*pooler.*saved None", targets=["all-body"])


def test_masks_beside_dense_weights_are_refused(tmp_path, copied):
    save_file(dict(bert().state_dict()), copied / "model.safetensors", metadata={"format": "pt"})
    refuse(tmp_path, copied, r'other weights: [\d,]+ of the pruned weights of "bert\.', early=False)


def test_masks_of_another_step_are_refused(tmp_path, copied):
    state = json.loads((copied / "trainer_state.json").read_text())
    (copied / "trainer_state.json").write_text(json.dumps(state | {"global_step": 7}))
    moved = copied.rename(tmp_path / "checkpoint-7")
    refuse(tmp_path, moved, "masks .* are of step 6, its weights of step 7")


CHANGES = {
    "target_sparsity": (0.6, "`target_sparsity`: 0.5 -> 0.6"),
    "criterion": ("taylor", "`criterion`: 'snip_momentum' -> 'taylor'"),
    "pattern": ("4x1", "`pattern`: 'unstructured' -> '4x1'"),
    "scope": ("layer", "`scope`: None -> 'layer'"),
    "sparsity_decay_type": ("linear", "`sparsity_decay_type`: 'cubic' -> 'linear'"),
    "algorithm": ("granet", "`algorithm`: 'gradual' -> 'granet'"),
    "groups": ({"all": {"targets": ["all-blocks"]}}, "`groups`: None -> {'all'"),
}


@pytest.mark.parametrize("option", CHANGES)
def test_a_changed_option_is_refused_by_name(tmp_path, saved, option):
    value, message = CHANGES[option]
    refuse(tmp_path, saved, message, **{option: value})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prune_end": 9}, r"`prune_end` \(steps\): 8 -> 9"),
        ({"prune_start": 2}, r"`prune_start` \(steps\): 3 -> 2"),
        ({"prune_every": 1}, r"`prune_every` \(steps\): 2 -> 1"),
    ],
)
def test_a_changed_schedule_is_refused_by_name(tmp_path, saved, changes, message):
    refuse(tmp_path, saved, message, early=False, **changes)


def test_another_number_of_training_steps_is_refused_where_the_schedule_depends_on_it(tmp_path):
    options = OPTIONS | FRACTIONS
    make(tmp_path, **options, save_strategy="steps", save_steps=6).train()
    refuse(
        tmp_path, tmp_path / "checkpoint-6", r"`prune_end` \(steps\): 8 -> 16", early=False, **FRACTIONS, max_steps=20
    )
    takes = "`prune_start`, `prune_end` and `prune_every` take these step numbers in place of fractions"
    refuse(tmp_path, tmp_path / "checkpoint-6", takes, early=False, **FRACTIONS, max_steps=20)
    # The remedy works: the numbers on the left sides of the message.
    steps = {"prune_start": 2, "prune_end": 8, "prune_every": 1}
    longer = make(tmp_path / "longer", **OPTIONS | steps, max_steps=20)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert longer.state.global_step == 20 and longer.sparsity_callback.pruner.sparsity() == 0.5


def test_all_changes_are_named_together(tmp_path, saved):
    refuse(
        tmp_path,
        saved,
        "target_sparsity.*scope.*initial_sparsity.*from its weights.$",
        target_sparsity=0.9,
        scope="global",
        initial_sparsity=0.2,
    )


def test_a_missing_folder_is_refused(tmp_path):
    refuse(tmp_path, tmp_path / "checkpoint-3", "there is no such folder")


def test_a_checkpoint_without_its_optimizer_is_refused_unless_that_is_what_the_run_saves(tmp_path, caplog):
    options = OPTIONS | EVERY_STEP | {"save_only_model": True}
    make(tmp_path, **options).train()
    refuse(tmp_path, tmp_path / "checkpoint-6", "optimizer.pt, scheduler.pt.*save_only_model")
    resumed = make(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "has no optimizer state, so the run is not resumed exactly" in caplog.text
    assert resumed.sparsity_callback.pruner.sparsity() == 0.5


def test_a_renamed_checkpoint_is_as_good(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "mine")
    trainer = make(tmp_path / "resumed", **OPTIONS)
    trainer.train(str(tmp_path / "mine"))  # positionally, as Trainer allows it
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("nothing", [None, False])
def test_nothing_to_resume_from(tmp_path, nothing):
    trainer = make(tmp_path, **OPTIONS)
    trainer.train(resume_from_checkpoint=nothing)
    assert len(trainer.state.log_history) == STEPS + 1


def test_every_option_is_compared(saved):
    """An option that is added to PruningConfig takes part, without being listed anywhere."""
    compared = {key.removesuffix(IN_STEPS) for key in ResumeState(saved).files[0].values["config"]}
    options = {option.name for option in dataclasses.fields(PruningConfig)}
    by_effect = {"targets", "exclude"} | {field.name for field in dataclasses.fields(DistillationOptions)}
    assert options - compared == {"pruning_config"} | by_effect  # the name of a file; weights; a file of their own


def test_options_of_an_earlier_version_are_compared_as_what_they_mean():
    current = PruningConfig(target_sparsity=0.5, groups={"a": {"targets": ["*"]}}).to_dict()
    saved = {name: value for name, value in current.items() if name not in ("algorithm", "criterion_kwargs")}
    saved |= {"solver": "zero", "groups": {"a": {"targets": ["*"]}}, "regrow": 0.0}
    assert changed_options(saved, current) == []
    assert changed_options(saved, current | {"algorithm": "rigl"}) == ["`algorithm`: 'gradual' -> 'rigl'"]
    granet = {"algorithm": "granet", "algorithm_kwargs": {"fraction": 0.5, "decay": "linear"}}
    assert (
        changed_options(saved | {"criterion": "snip", "regrow": 0.5}, current | {"criterion": "snip"} | granet) == []
    )
    assert changed_options(saved, current | {"criterion_kwargs": {"decay": 0.5}}) == [
        "`criterion_kwargs`: None -> {'decay': 0.5}"
    ]


def test_options_without_effect_in_a_file_of_an_earlier_version_are_no_change():
    config = PruningConfig(target_sparsity=0.5, prune_start=3, prune_end=3)
    current = compared_options(config, config.schedule(10))
    assert changed_options(current | {f"prune_every{IN_STEPS}": 2}, current) == []
    (change,) = changed_options(current | {f"prune_end{IN_STEPS}": 4}, current)
    assert "prune_end" in change and change.endswith(": 4 -> 3")
    config = PruningConfig(pattern="2:4", scheduler="oneshot")
    current = compared_options(config, config.schedule(10))
    assert changed_options(current | {"scope": "row"}, current) == []
