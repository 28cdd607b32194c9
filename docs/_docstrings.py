"""Reads docstrings as this package writes them: examples under `Example:`, and parameters that share a text."""

import re
from typing import Any

import griffe


class HouseStyle(griffe.Extension):
    """Turns `Example:` into the section that is rendered as code, and "a, b: text" into a line for each name."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = separate_names(re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value))


def separate_names(text: str) -> str:
    """Returns a docstring in whose `Args:` each parameter has its own text."""

    def separate(entry: re.Match[str]) -> str:
        names, words = entry[1].split(", "), entry[2]
        return "".join(f"    {name}: {words}" for name in names)

    def section(found: re.Match[str]) -> str:
        return re.sub(r"(?m)^ {4}(\w+(?:, \w+)+): ((?:.*\n?)(?: {5,}.*\n?)*)", separate, found[0])

    return re.sub(r"(?m)^Args:\n(?: {4}.*\n?|\n)+", section, text + "\n").rstrip("\n")
