"""One-shot pruning on several ranks splits the calibration data and prunes as one process."""

import os
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent


def _run(num_ranks, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    paths = [HERE.parents[1], HERE.parent]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": ":".join(map(str, paths))}
    done = subprocess.run(
        [*command, str(HERE / "oneshot_processes_worker.py"), str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_two_ranks_prune_as_one_process(tmp_path):
    assert _run(2, tmp_path / "state").count(" checks, 0 wrong") == 2
