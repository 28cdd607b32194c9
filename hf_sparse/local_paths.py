"""Names and texts as others may read them: without the folders of this machine, which can hold the name of a user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


# A path with at least two parts: absolute, in a home folder or above the current folder. What precedes it is no part
# of a relative path, a glob or an address; a path in quotes may have spaces.
_PART = r"[^\s\"'`,;:|<>(){}\[\]/\\]+"
_START = r"(?<![\w.~*)\]/\\-])(?:file://)?(?:~[\w.-]*/|(?:\.\./)+|/(?!/)(?=[^/\s]+/)|[A-Za-z]:[\\/](?=[^/\\\s]+[\\/]))"
_QUOTED_PATH = re.compile(rf"(?<=[\"']){_START}[^\"'\n]*?(?=[\"'])")
_PATH = re.compile(rf"{_START}(?:{_PART}[\\/]+)*(?:{_PART})?")


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder of this machine, and not of a repository on the Hub.

    Example:
        >>> is_local("/home/me/bert"), is_local("../bert"), is_local("google-bert/bert-base-uncased")
        (True, True, False)
    """
    return is_path(name) or Path(name).exists()


def is_path(name: str) -> bool:
    """Whether a name can only be a path, whether or not it exists: absolute, or with an explicit folder to start at.

    Example:
        >>> is_path("C:\\\\models\\\\bert"), is_path("~/bert"), is_path("runs/bert")
        (True, True, False)
    """
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return absolute or name in (".", "..") or name.startswith(("~", "./", "../", ".\\", "..\\", "file://"))


def published_name(name: str) -> str:
    """Returns a name as others may read it: of a local file or folder the last part.

    Example:
        >>> published_name("textattack/bert-base-uncased-SST-2"), published_name("/home/me/runs/dense/")
        ('textattack/bert-base-uncased-SST-2', 'dense')
    """
    if not is_local(name):
        return name
    parts = PureWindowsPath(name).parts if "\\" in name else PurePosixPath(name).parts
    last = parts[-1] if parts else ""
    return Path(name).resolve().name if last in ("", ".", "..", "~", "/") else last


def published_values(value: Any) -> Any:
    """Returns nested lists and mappings of JSON values in which paths are replaced by their last part.

    Example:
        >>> published_values({"alpha": 0.5, "files": ["/home/me/scores.json"]})
        {'alpha': 0.5, 'files': ['scores.json']}
    """
    if isinstance(value, Mapping):
        return {name: published_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [published_values(item) for item in value]
    return published_name(value) if isinstance(value, str) and is_path(value) else value


def shorten_paths(text: str) -> str:
    """Replaces the paths in a text that start outside of the current folder by `path/to/` and their last part.

    Example:
        >>> shorten_paths("--model /home/me/bert --data=~/sst2/dev.json --out runs/bert --url https://hf.co/a/b")
        '--model path/to/bert --data=path/to/dev.json --out runs/bert --url https://hf.co/a/b'
    """
    return _PATH.sub(_shorten, _QUOTED_PATH.sub(_shorten, text))


def _shorten(match: re.Match[str]) -> str:
    parts = [part for part in re.split(r"[\\/]+", match[0]) if part not in ("", ".", "..")]
    return f"path/to/{parts[-1]}" if parts else match[0]
