"""A prune step of sharded weights receives few bytes on each rank, in few collectives."""

import os
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent


def test_traffic_of_a_prune_step():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(HERE / "traffic_worker.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("within limits") == 12
