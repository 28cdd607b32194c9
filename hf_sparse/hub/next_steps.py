"""What can be done with a folder of a pruned model: the commands, ready to be copied."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..files import REPORT_FILE, SHRINK_FILE
from ..patterns import get_pattern
from ..reporting.report import SparsityReport


def format_next_steps(folder: str | Path, is_pushed: bool = False) -> str:
    """Returns the commands that can follow, one on a line, each with what it does.

    Args:
        folder: that a pruned model was saved to.
        is_pushed: whether it is on the Hub already.
    """
    directory = Path(folder)
    path = shlex.quote(str(folder))
    small = shlex.quote(f"{str(folder).rstrip('/')}-small")
    steps = [(f"hf-sparse report {path}", "the zeros of each layer, counted in the files")]
    if not (directory / SHRINK_FILE).is_file() and _has_coupled_units(directory):
        steps.append((f"hf-sparse shrink {path} {small}", "remove what is zero: a smaller, faster model"))
    steps.append((f"hf-sparse card {path}", "write the model card anew after a change"))
    if not is_pushed:
        name = directory.resolve().name
        steps.append((f"hf-sparse push {path} {shlex.quote(f'USER/{name}')}", "upload it to the Hub with its card"))
    width = max(len(command) for command, _ in steps)
    return "\n".join(["next:", *(f"  {command:<{width}}  # {purpose}" for command, purpose in steps)])


def _has_coupled_units(directory: Path) -> bool:
    """Whether the report names a pattern whose units can be removed."""
    if not (directory / REPORT_FILE).is_file():
        return False
    for pattern in {layer.pattern for layer in SparsityReport.load(directory / REPORT_FILE).layers}:
        try:
            if get_pattern(pattern).coupled_kind is not None:
                return True
        except ValueError:  # of a plug-in that is not loaded
            continue
    return False
