"""Recipe files: the options of pruning as YAML or JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """The safe loader, with the numbers of YAML 1.2, which JSON shares: 2:4 is text, not 124 in base 60, and 1e-3 is
    a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT)]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), [*"-+.0123456789"]
)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a recipe file.

    Raises:
        ValueError: it cannot be read, is malformed, or holds something else than keys and values.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("pattern: 2:4\\nprune_every: 1e-3\\n")
        ...     file.flush()
        ...     read_recipe(file.name)
        {'pattern': '2:4', 'prune_every': 0.001}
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        values = loader.get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"pruning_config {path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"pruning_config {path} must hold options and their values, but holds {type(values).__name__}."
        )
    return values
