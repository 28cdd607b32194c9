"""Runs that are killed at a random event of a file in their folder, and go on as if nothing had happened.

Python announces the events (opened, renamed, removed, made) to audit hooks; SIGKILL comes just before one of them.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import SCHEDULE, STEPS, bert, content, make, same, weights

from hf_sparse import OneshotConfig, prune_oneshot


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.chmod")
TRAINING = {"target_sparsity": 0.5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, **SCHEDULE}
# Events of a whole run, at least: later kills would find it finished.
TRAINING_EVENTS, ONESHOT_EVENTS = 100, 12


def die_at(event_number: int, folder: str) -> None:
    """Kills this process at an event of a file in `folder`."""
    left = event_number

    def hook(event, arguments):
        nonlocal left
        if event in EVENTS and arguments and str(arguments[0]).startswith(folder):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train(folder: str, event_number: int | None) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if event_number is not None:
        die_at(event_number, folder)
    checkpoints = list(Path(folder).glob("checkpoint-*/trainer_state.json"))
    make(folder, model=bert(seed=3), **TRAINING).train(resume_from_checkpoint=bool(checkpoints))


def prune(folder: str, event_number: int | None) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    if event_number is not None:
        die_at(event_number, folder)
    model = bert(seed=3, num_hidden_layers=3)
    batches = [{"input_ids": torch.arange(16).reshape(2, 8) + 2}]
    config = OneshotConfig(target_sparsity=0.5, solver="sparsegpt", activations="disk")
    prune_oneshot(model, batches, config, progress=False, state_dir=folder)
    return weights(model)


@pytest.fixture(scope="module")
def processes():
    """Forks of this process, which has imported everything."""
    return multiprocessing.get_context("fork")


def killed(processes, target, *arguments) -> bool:
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join(timeout=120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def check_training(processes, folder, seeds):
    """Killed once, resumed, killed again, resumed: bitwise the run that was not killed."""
    train(str(folder / "whole"), None)
    expected = content(folder / "whole" / f"checkpoint-{STEPS}")
    count = 0
    for seed in seeds:
        chance, run = random.Random(seed), folder / str(seed)
        run.mkdir()
        for _ in range(2):
            count += killed(processes, train, str(run), chance.randrange(TRAINING_EVENTS))
        train(str(run), None)
        assert content(run / f"checkpoint-{STEPS}") == expected, seed
        assert not [path for path in run.rglob("*") if path.name.startswith(".")], seed
        shutil.rmtree(run)
    assert count > len(seeds)  # the kills come within the runs


def check_oneshot(processes, folder, seeds):
    (folder / "whole").mkdir()
    expected = prune(str(folder / "whole"), None)
    for seed in seeds:
        chance, run = random.Random(seed), folder / str(seed)
        run.mkdir()
        assert killed(processes, prune, str(run), chance.randrange(ONESHOT_EVENTS)), seed
        assert same(prune(str(run), None), expected), seed


def test_training_killed_at_random_events_ends_the_same(processes, tmp_path):
    check_training(processes, tmp_path, range(4))


def test_oneshot_pruning_killed_at_random_events_ends_the_same(processes, tmp_path):
    check_oneshot(processes, tmp_path, range(6))


@pytest.mark.slow
def test_training_killed_at_many_random_events_ends_the_same(processes, tmp_path):
    check_training(processes, tmp_path, range(100, 120))


@pytest.mark.slow
def test_oneshot_pruning_killed_at_many_random_events_ends_the_same(processes, tmp_path):
    check_oneshot(processes, tmp_path, range(100, 120))
