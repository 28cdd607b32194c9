"""Errors that users can correct, as one line that names options as they are typed. `hf-sparse` and the scripts print
them, with exit code 2."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping


MISTAKES: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, NotImplementedError)
"""Errors that users can correct, unless `is_internal`."""

# What raises errors of these types about tensors, which say nothing to a user without the traceback.
_NUMERICAL_PACKAGES = ("torch", "numpy", "triton")

_HEAD_START = 10.0
"""Seconds by which the processes of one machine may reach a mistake after the first one."""


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
        error: its message has the names of Python fields.
        spelled: the options of the program: names of Python fields, and how they are typed.

    Example:
        >>> format_mistake(ValueError("length is 0: use length=8."), {"length": "--length"})
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
    """Returns a text in which options are named as they are typed: in `name=value`, names of several words anywhere,
    and other names where a sentence begins with them, a quoted value follows, or a verb is about them, also in a list.

    Args:
        text: one line.
        spelled: as in `format_mistake`.

    Example:
        >>> names = ["text_column", "scope", "permute", "exclude", "criterion_kwargs", "pattern"]
        >>> spelled = {name: "--" + name.replace("_", "-") for name in names}
        >>> spell_options('scope is "rows": use scope=row, or leave permute out.', spelled)
        '--scope is "rows": use --scope row, or leave --permute out.'
        >>> spell_options('the pattern of "text_column": exclude=["*.query"], text_column.', spelled)
        'the pattern of "text_column": --exclude "*.query", --text-column.'
        >>> print(spell_options('set criterion_kwargs={"decay": 1.0}.', spelled))
        set --criterion-kwargs '{"decay": 1.0}'.
        >>> spell_options("scope, text_column, pattern have no effect: leave scope, pattern out.", spelled)
        '--scope, --text-column, --pattern have no effect: leave --scope, --pattern out.'
    """
    names = "|".join(sorted(map(re.escape, spelled), key=len, reverse=True))
    if not names:
        return text
    word, end = rf"(?<![\w\"'./\\=*-])({names})", r"(?![\w\"'/\\=*-]|\.\w)"
    value = r"(\"[^\"\s]*\"|\{[^}]*\}|\[[^\]]*\]|[\w.:+/-]*\w)"
    text = re.sub(rf"{word}={value}", lambda match: _typed(spelled[match[1]], match[2]), text)
    text = re.sub(rf"{word}{end}", lambda match: spelled[match[1]] if "_" in match[1] else match[0], text)
    text = re.sub(rf"(?<!the ){word}(?= \"[^ ])", lambda match: spelled[match[1]], text)
    text = re.sub(
        rf"(?<=, )({names})(?=(?:, [\w-]+)*(?: have no effect| out\b))", lambda match: spelled[match[1]], text
    )
    before = r"(^|[.:;?] (?:- )?|\b(?:leave|needs|pass|set|lower|raise|give|add|without) )"
    return re.sub(rf"{before}{word}{end}", lambda match: match[1] + spelled[match[2]], text)


def _typed(option: str, value: str) -> str:
    """Returns an option with a value in Python's notation as they are typed."""
    if value in ("True", "False"):
        return option if value == "True" else option.replace("--", "--no-" if "_" not in option else "--no_", 1)
    if value.startswith("{"):
        return f"{option} '{value}'"
    if value.startswith("["):
        return f"{option} {value[1:-1].replace(',', '')}"
    return f"{option} {value}" if "*" in value else f"{option} {value.strip(chr(34))}"
