"""The pruner of split weights decides what the pruner of whole weights does, mask for mask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent


def _run(processes, *arguments, seconds=580):
    """The worker's last line, one for each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
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


def test_two_processes_decide_as_one():
    assert _run(2).count(" cases, 0 wrong") == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_every_criterion_pattern_and_scope_on_every_layout(processes):
    assert _run(processes, "everything", seconds=3600).count(" cases, 0 wrong") == processes
