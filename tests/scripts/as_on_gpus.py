"""Runs a script on ranks that have no GPUs as accelerate would run it on those that have: as_on_gpus.py SCRIPT ..."""

import os
import runpy
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from helpers.modes import as_on_gpus  # noqa: E402


def main() -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        # Its own sums over ranks are compiled at first use, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    with as_on_gpus("fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"):
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
