"""Measured latency in a card: what `hf-sparse bench --json` wrote about the model of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import read_json
from ...local_paths import published_name
from ...reporting.tables import format_markdown_table
from .escaping import escape


_ROW = {"runtime": str, "batch_size": int, "reference": float, "median": float}
_RATIOS = {"ratio": float, "low": float, "high": float}


def read_latency(path: str | Path, directory: str | Path) -> dict[str, Any]:
    """Reads what a benchmark measured of the model in a folder, in comparison with the first model of the benchmark.

    Args:
        path: output of `hf-sparse bench --json`.
        directory: the folder, under which the benchmark measured it.

    Returns: `reference`, `length`, `clock` and `rows`, without local paths.

    Raises:
        OSError: the file does not exist.
        ValueError: it is damaged, or has no such model.
    """
    values = read_json(path)
    try:
        names = [size["name"] for size in values["sizes"]]
        own = next((name for name in names[1:] if Path(name).resolve() == Path(directory).resolve()), None)
        if own is None:
            raise ValueError(
                f"it measured {', '.join(names)}, and {directory} must be one of them, after the model that it is "
                f"compared with: hf-sparse bench DENSE {directory} --json"
            )
        medians = {(row["model"], row["runtime"], row["batch_size"]): row["median"] for row in values["latencies"]}
        rows = [
            {name: row[name] for name in ("runtime", "batch_size", "median", *_RATIOS)}
            | {"reference": medians[names[0], row["runtime"], row["batch_size"]]}
            for row in values["latencies"]
            if row["model"] == own
        ]
        latency = {
            "reference": published_name(names[0]),
            "length": values["length"],
            "clock": values["clock"],
            "rows": rows,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the output of hf-sparse bench --json: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not is_latency(latency):
        raise ValueError(f"{path} is not the output of hf-sparse bench --json, or is damaged.")
    return latency


def is_latency(values: Mapping[str, Any]) -> bool:
    """Whether a value of JSON is one that `read_latency` returns."""
    rows = values.get("rows")
    return (
        isinstance(values.get("reference"), str)
        and isinstance(values.get("clock"), str)
        and type(values.get("length")) is int
        and isinstance(rows, list)
        and bool(rows)
        and all(isinstance(row, dict) and _has_types(row, _ROW | _RATIOS) for row in rows)
    )


def _has_types(row: Mapping[str, Any], kinds: Mapping[str, type]) -> bool:
    numbers = (int, float)
    return all(
        type(row.get(name)) in numbers if kind is float else type(row.get(name)) is kind
        for name, kind in kinds.items()
    )


def latency_table(latency: Mapping[str, Any]) -> str:
    """Returns the measured times as a Markdown table, with a sentence on how they were measured."""
    header = ("runtime", "batch", f"{escape(latency['reference'])}, ms", "this model, ms", "ratio", "quartiles")
    rows = [
        (
            escape(row["runtime"]),
            str(row["batch_size"]),
            f"{row['reference'] * 1e3:.2f}",
            f"{row['median'] * 1e3:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f}-{row['high']:.2f}",
        )
        for row in latency["rows"]
    ]
    note = (
        f"{escape(latency['clock'].capitalize())} of one batch, sequences of {latency['length']} tokens, both models "
        "measured in turns with `hf-sparse bench`."
    )
    return f"{format_markdown_table(header, rows, text_columns=1)}\n\n{note}"
