"""Runs programs of several processes."""

import subprocess


ABORT = "terminate called without an active exception"
"""What gloo writes when it aborts a process that exits: after its work is done, and only on busy machines."""


def run_launcher(command, environment, attempts=3):
    """Runs a command that launches processes, once more if gloo aborted one of them at its exit."""
    for _ in range(attempts):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode == 0 or ABORT not in done.stderr:
            break
    return done
