"""Starts ranks with torchrun once for many scenarios: start-up and imports take longer than training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


HERE = Path(__file__).parent
# A rank that hangs for SCENARIO_SECONDS prints its traceback and is killed.
SCENARIO_SECONDS = 120
START_SECONDS = 300


@dataclass(frozen=True)
class Run:
    """The results of one scenario.

    Args:
        folder: with all files.
        ranks: per rank, its `rank-<r>.json` (see `scenario.py`); `{}` where it was killed.
        exits: per rank, the exit code; -9 where it was killed.
    """

    folder: Path
    ranks: list[dict]
    exits: list[int]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The whole weights after training, by name."""
        return load_file(self.folder / "weights.safetensors")

    @property
    def log(self) -> str:
        """The end of each rank's output."""
        logs = sorted(self.folder.glob("rank-*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}" for log in logs)


class Ranks:
    """`world` ranks started by torchrun, each of which forks a child per scenario: scenarios are isolated from each
    other, and killing one does not end the ranks."""

    def __init__(self, world: int, folder: Path):
        self.world, self.folder, self.count = world, Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.output = open(self.folder / "torchrun.log", "w+")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.process = subprocess.Popen(
            [*command, str(HERE / "worker.py"), str(self.folder), str(os.getpid())],
            env=environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait([self.folder / f"ready-{rank}" for rank in range(world)], START_SECONDS)

    def run(self, mode: str, name: str, fails: bool = False, world: int | None = None, **scenario) -> Run:
        """Runs one scenario (see `scenario.py`) and waits for it.

        Args:
            mode: a key of `MODES`.
            name: for the folder of its results.
            fails: whether ranks may exit with an error.
            world: number of ranks that take part; default all.
        """
        world = world or self.world
        folder = self.folder / f"{self.count:03}-{name}"
        folder.mkdir()
        scenario |= {"mode": mode, "world": world, "folder": str(folder), "seconds": SCENARIO_SECONDS}
        # Renamed, so that no rank reads an incomplete file.
        temporary = self.folder / "next"
        temporary.write_text(json.dumps(scenario, default=str))
        temporary.rename(self.folder / f"scenario-{self.count}.json")
        self.count += 1
        exits = [folder / f"exit-{rank}" for rank in range(self.world)]
        self._wait(exits, SCENARIO_SECONDS + 60)
        results = [folder / f"rank-{rank}.json" for rank in range(world)]
        run = Run(
            folder,
            [json.loads(path.read_text()) if path.is_file() else {} for path in results],
            [int(path.read_text()) for path in exits[:world]],
        )
        if not fails and any(run.exits):
            raise AssertionError(f"{name} on {world} ranks, mode {mode}: exit codes {run.exits}\n{run.log}")
        return run

    def _wait(self, paths: list[Path], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not all(path.is_file() for path in paths):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                missing = ", ".join(path.name for path in paths if not path.is_file())
                output = (self.folder / "torchrun.log").read_text(errors="replace")[-6000:]
                raise RuntimeError(f"torchrun ended or took over {seconds} s, without {missing}:\n{output}")
            time.sleep(0.01)

    def close(self) -> None:
        """Ends torchrun, its ranks and their children, which are process groups of one session."""
        (self.folder / "stop").touch()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        for pid in _session(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.output.close()


def _session(leader: int) -> list[int]:
    """Returns the ids of the processes of a session."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat") if Path("/proc").is_dir() else ():
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(int(status.parent.name))
    return found or [leader]
