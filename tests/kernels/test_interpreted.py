"""Kernels without a GPU: the tests in tests/gpu/ run them in Triton's interpreter, which is chosen before Triton is
imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parents[1]


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", minversion="3.9")  # earlier interpreters do not know numpy 2.4
    # The interpreter is slow: of some parameters, the values between the extremes are left to GPUs.
    selected = (
        "interpreter and not float64 and not float16 and (kernels or all_steps or those_of_the_cpu and magnitude) "
        "and not (False-neg or True-square or float32-1-4 or float32-3-7 or interpreter-300)"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "-k", selected]
    command += [str(TESTS / "gpu" / "test_gpu_kernels.py"), str(TESTS / "gpu" / "test_gpu_masks.py")]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout
