"""A pruner of sharded weights computes the masks of a pruner of whole weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent


def _run(num_ranks, *arguments, seconds=580):
    """Returns the output of all ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}"}
    done = subprocess.run(
        [*command, str(HERE / "pruner_worker.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_two_ranks_prune_as_one_process():
    assert _run(2).count(" cases, 0 wrong") == 2


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_criterion_pattern_and_scope_on_every_layout(num_ranks):
    assert _run(num_ranks, "everything", seconds=3600).count(" cases, 0 wrong") == num_ranks
