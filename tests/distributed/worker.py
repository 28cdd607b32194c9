"""A rank started by torchrun: imports once, then forks a child for each scenario and writes its exit code.

    python -m torch.distributed.run --standalone --nproc_per_node 2 worker.py FOLDER PID

It ends when FOLDER contains a file `stop`, or when the process PID has ended.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path


def main(folder: Path, starter: int) -> None:
    rank = int(os.environ["RANK"])
    import scenario
    from helpers import modes

    import hf_sparse.training.callback

    for name in ("plot_schedule", "plot_layers"):
        setattr(hf_sparse.training.callback, name, lambda *args, **kwargs: None)
    if modes.available("zero3"):
        import deepspeed.ops  # slow: imported here once for all children

        # DeepSpeed's own all-reduce is compiled at first use, busy-waits, and leaks shared memory when killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gc.freeze()
    (folder / f"ready-{rank}").touch()
    count = 0
    while not (folder / "stop").exists() and _alive(starter):
        path = folder / f"scenario-{count}.json"
        if not path.is_file():
            time.sleep(0.01)
            continue
        _run(json.loads(path.read_text()), rank, scenario.main)
        count += 1


def _run(scenario: dict, rank: int, body) -> None:
    """Runs `body` in a child, which is killed soon after another rank's child fails, as torchrun does."""
    folder, world = Path(scenario["folder"]), scenario["world"]
    if rank >= world:
        return _write(folder / f"exit-{rank}", "0")
    child = os.fork()
    if child == 0:
        os._exit(_child(scenario, rank, body))
    deadline = time.monotonic() + scenario["seconds"] + 20
    others = [folder / f"exit-{other}" for other in range(world) if other != rank]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return _write(folder / f"exit-{rank}", str(os.waitstatus_to_exitcode(status)))
        if any(other.is_file() and other.read_text() != "0" for other in others):
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _child(scenario: dict, rank: int, body) -> int:
    log = os.open(Path(scenario["folder"]) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.dump_traceback_later(scenario["seconds"], exit=True, file=sys.stderr)
    world = str(scenario["world"])
    os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    try:
        trainer = body(scenario, rank)  # noqa: F841 - kept alive: tearing down DDP and gloo can deadlock
        _wait_for_others(Path(scenario["folder"]), rank, scenario["world"])
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait_for_others(folder: Path, rank: int, world: int) -> None:
    """Waits for the other ranks, through files: the first rank to exit would break the connections of the last."""
    (folder / f"done-{rank}").touch()
    while not all((folder / f"done-{other}").exists() for other in range(world)):
        time.sleep(0.01)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
