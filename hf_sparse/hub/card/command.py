"""The command that started this program, for others to run again."""

from __future__ import annotations

import re
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ...local_paths import is_path, published_name, shorten_paths


# Options whose values are secret, such as --hub_token, --token and --api-key.
_SECRET_OPTION = re.compile(
    r"--?([a-z0-9]+[-_])*(token|tokens|password|passwd|secret|api[-_]?key|access[-_]?key|credentials?)"
)
_MAX_LINE_LENGTH = 100
_PACKAGE = Path(__file__).resolve().parents[2]


def command_line() -> str | None:
    """Returns the command that started this program, without options that hold secrets.

    None where no script of the user was started: in a notebook, an interactive shell, or a program of another package,
    such as pytest.
    """
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if not file:
        return None
    path, paths = Path(file).resolve(), sysconfig.get_paths()
    if path.parent == Path(paths["scripts"]).resolve():
        return format_command(path.name, sys.argv[1:]) if path.name == "hf-sparse" else None
    libraries = [Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")]
    if path.parent != _PACKAGE and any(path.is_relative_to(library) for library in libraries):
        return None
    if spec is not None:
        return format_command(f"python -m {spec.name.removesuffix('.__main__')}", sys.argv[1:])
    current = Path.cwd().resolve()
    script = path.relative_to(current) if path.is_relative_to(current) else path.name
    return format_command(f"python {shlex.quote(str(script))}", sys.argv[1:])


def format_command(program: str, arguments: Sequence[str]) -> str:
    """Returns a shell command without the options that hold secrets and without the folders of this machine; a long
    one has a line for each option.

    Example:
        >>> format_command("python run.py", ["--hub_token", "abc", "--model", "/home/me/bert", "--name", "a b"])
        "python run.py --model path/to/bert --name 'a b'"
    """
    words: list[str] = []
    is_secret_value = False
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        is_secret = _SECRET_OPTION.fullmatch(name.lower()) is not None
        if not is_secret and not (is_secret_value and not argument.startswith("-")):
            words.append(_quote(_without_folders(argument)))
        is_secret_value = is_secret and not separator
    line = " ".join([program, *words])
    if len(line) <= _MAX_LINE_LENGTH:
        return line
    return program + "".join(f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in words)


def _without_folders(argument: str) -> str:
    """Returns an argument with `path/to/` for folders of this machine."""
    name, separator, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    if " " in value and is_path(value):  # one path with spaces, which in a longer text would end it
        return f"{name}{separator}path/to/{published_name(value)}"
    return shorten_paths(argument)


def _quote(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    # bash's $'...' quoting, because a line break in the argument would end the line.
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + "'"
