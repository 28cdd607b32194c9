"""Errors that users can correct, as one line that names options as they are typed. `hf-sparse` and the scripts print
them, with exit code 2."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from collections.abc import Mapping


MISTAKES: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, NotImplementedError)
"""Errors that users can correct, unless `is_internal`."""

# What raises errors of these types about tensors, which say nothing to a user without the traceback.
_NUMERICAL_PACKAGES = ("torch", "numpy", "triton")

_HEAD_START = 60.0
"""Seconds in which the first process of a machine reaches a mistake and exits, also where all are busy."""


def is_internal(error: BaseException) -> bool:
    """Whether an error was raised inside a numerical package: no mistake in an option, so that its traceback matters.

    Example:
        >>> import numpy
        >>> try:
        ...     numpy.stack([])
        ... except ValueError as error:
        ...     print(is_internal(error), is_internal(ValueError()))
        True False
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
    return not isinstance(error, OSError) and module.split(".")[0] in _NUMERICAL_PACKAGES


def format_mistake(error: BaseException, spelled: Mapping[str, str]) -> str:
    """Returns the message of an error on one line.

    Args:
        error: its message has options in backticks.
        spelled: the options of the program: names of Python fields, and how they are typed.

    Example:
        >>> format_mistake(ValueError("`length` is 0: use `length=8`."), {"length": "--length"})
        '--length is 0: use --length 8.'
    """
    text = str(error) or type(error).__name__
    return spell_options(" ".join(text.split()), spelled)


def print_mistake(line: str) -> None:
    """Prints a line on stderr, once where several processes of a machine make the same mistake.

    The first process (`LOCAL_RANK`) prints at once and exits, and launchers such as torchrun then end the others,
    which wait for that. A process that still runs afterwards has made a mistake that the first has not.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_HEAD_START)
    print(line, file=sys.stderr, flush=True)


def spell_options(text: str, spelled: Mapping[str, str]) -> str:
    """Returns a text in which each `name` and `name=value` in backticks that is an option is as it is typed.

    Args:
        text: one line.
        spelled: as in `format_mistake`.

    Example:
        >>> spelled = {name: f"--{name}" for name in ("scope", "permute", "exclude", "criterion_kwargs")}
        >>> spell_options('`scope` is "rows": use `scope="row"`, or leave `permute` out, as `hf` does.', spelled)
        '--scope is "rows": use --scope row, or leave --permute out, as `hf` does.'
        >>> spell_options('use `permute=False`, or `exclude=["*.query", "*.key"]`.', spelled)
        'use --no-permute, or --exclude "*.query" "*.key".'
        >>> spell_options("keep block 0 too, with `layers=[0, 2, 3]`.", {"layers": "--layers"})
        'keep block 0 too, with --layers 0,2,3.'
        >>> print(spell_options('set `criterion_kwargs={"update": False}`.', spelled))
        set --criterion_kwargs '{"update": false}'.
    """

    def spell(match: re.Match[str]) -> str:
        option = spelled.get(match[1])
        if option is None:
            return match[0]
        return option if match[2] is None else _typed(option, match[2])

    return re.sub(r"`(\w+)(?:=([^`]*))?`", spell, text)


def _typed(option: str, text: str) -> str:
    """Returns an option with a value in Python's notation as they are typed."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name, or a value that was shortened
        value = text
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-" if "_" not in option else "--no_", 1)
    if isinstance(value, dict):
        return f"{option} '{json.dumps(value)}'"
    values = value if isinstance(value, (list, tuple)) else [value]
    between = "," if all(isinstance(each, int) for each in values) else " "  # as in --layers 0,1,4
    return f"{option} {between.join(map(_quoted, values))}"


def _quoted(value: object) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w.,:+/=-]+", text) else f'"{text}"'
