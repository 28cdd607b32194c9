"""What others wrote, made safe for a model card: escaped where it stands in Markdown, and without secrets."""

from __future__ import annotations

import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path


REMOVED = "<removed>"

# Access tokens of the Hub, wherever they stand.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
# Options whose value nobody should read: --hub_token, --token, --api-key.
_SECRET = re.compile(
    r"--?([a-z0-9]+[-_])*(token|tokens|password|passwd|secret|api[-_]?key|access[-_]?key|credentials?)"
)
_TOKENS_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Shorter ones would be found inside of words. They are left out by the name of their option.
_SHORTEST_SECRET = 8

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


def escape(text: object) -> str:
    """`text` on one line, so that it reads as it is in a paragraph, a heading or a cell of a table.

    Example:
        >>> escape("a|b <!-- c --> _d_ e_f")
        'a\\\\|b &lt;!-- c --&gt; \\\\_d\\\\_ e_f'
    """
    line = "".join(character if character.isprintable() else " " for character in str(text))
    line = re.sub(r"[&<>]", lambda match: _ENTITIES[match.group()], " ".join(line.split()))
    return _SPECIAL.sub(r"\\\g<0>", line)


def fenced(text: str, language: str) -> str:
    """A block of code. Its fence is longer than any run of backticks in it.

    Example:
        >>> fenced("a ```` b", "bash").splitlines()
        ['`````bash', 'a ```` b', '`````']
    """
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def without_secrets(text: str, secrets: Iterable[str | None] = ()) -> str:
    """`text` without the tokens of this environment, the given ones, and what looks like a token of the Hub."""
    known = {*secrets, *(os.environ.get(name) for name in _TOKENS_ENVIRONMENT)}
    for secret in sorted((one for one in known if one and len(one) >= _SHORTEST_SECRET), key=len, reverse=True):
        text = text.replace(secret, REMOVED)
    return _TOKEN.sub(REMOVED, text)


def command_line() -> str | None:
    """How this program was started, so that a reader can start it again, less the options that hold secrets. None
    where no script was started: in a notebook, a shell or a test.
    """
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if not file:
        return None
    path, paths = Path(file).resolve(), sysconfig.get_paths()
    if path.parent == Path(paths["scripts"]).resolve():
        return command(path.name, sys.argv[1:]) if path.name == "hf-sparse" else None
    own = path.parent == Path(__file__).resolve().parent
    if not own and any(path.is_relative_to(Path(paths[name]).resolve()) for name in ("stdlib", "purelib", "platlib")):
        return None
    if spec is not None:
        return command(f"python -m {spec.name.removesuffix('.__main__')}", sys.argv[1:])
    here = Path.cwd().resolve()
    script = path.relative_to(here) if path.is_relative_to(here) else path.name
    return command(f"python {shlex.quote(str(script))}", sys.argv[1:])


def command(program: str, arguments: Sequence[str]) -> str:
    """A line for a shell, broken before options where it is long, less the options that hold secrets.

    Example:
        >>> command("python run.py", ["--hub_token", "abc", "--name", "a b", "--token=abc"])
        "python run.py --name 'a b'"
    """
    words: list[str] = []
    skip = False
    for argument in arguments:
        is_option = argument.startswith("-")
        if skip and not is_option:
            skip = False
            continue
        name, separator, _ = argument.partition("=")
        secret = is_option and _SECRET.fullmatch(name.lower())
        skip = bool(secret and not separator)
        if not secret:
            words.append(_quoted(argument))
    line = " ".join([program, *words])
    if len(line) <= 100:
        return line
    return program + "".join(f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in words)


def _quoted(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    # A line break would end the line here: bash's own way to write one down.
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + "'"
