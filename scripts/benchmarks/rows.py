"""Rows of a benchmark in a file of JSON lines, and the targets and methods that name its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def target_options(target: str) -> dict[str, Any]:
    """Returns the options of a target: a sparsity, a pattern, or both.

    Example:
        >>> target_options("50%"), target_options("neuron@0.5")
        ({'target_sparsity': 0.5}, {'pattern': 'neuron', 'target_sparsity': 0.5})
    """
    pattern, _, share = target.rpartition("@")
    if not pattern and not share.rstrip("%").replace(".", "", 1).isdigit():
        pattern, share = share, ""
    options: dict[str, Any] = {"pattern": pattern} if pattern else {}
    if share:
        options["target_sparsity"] = float(share[:-1]) / 100 if share.endswith("%") else float(share)
    return options


def method_options(method: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the options of a method's parts, joined by "+"; of an option that several set, the last value."""
    unknown = [name for name in method.split("+") if name not in parts]
    if unknown:
        raise SystemExit(
            f'"{unknown[0]}" is no part of a method: known are {", ".join(parts)}, and --part adds others.'
        )
    return {name: value for part in method.split("+") for name, value in parts[part].items()}


def with_given_parts(parts: Mapping[str, Mapping[str, Any]], given: list[str]) -> dict[str, Mapping[str, Any]]:
    """Returns the parts and those of `--part NAME=JSON`."""
    return dict(parts) | {name: json.loads(text) for name, text in (part.split("=", 1) for part in given)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; the last line may be cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def find_row(path: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the row of a run, if it is in the file."""
    return next((row for row in read_rows(path) if run.items() <= row.items()), None)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a row, after a line that was cut off on a line of its own."""
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        unfinished = not (file.read() or "\n").endswith("\n")
        file.write("\n" * unfinished + json.dumps(row) + "\n")
