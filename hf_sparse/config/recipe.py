"""Recipe files: the options of pruning as YAML or JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode

from ..files import MAX_DEPTH, MAX_DIGITS, parse_json, read_text


MAX_YAML_BYTES = 2**18
MAX_YAML_VALUES = 20_000
"""Keys and values. Larger YAML is not read: it would take seconds. As JSON, recipes can be larger."""
MAX_EXPANDED = 2**20
"""Characters and values of YAML in which every alias is replaced by what it stands for."""

_NULL, _BOOL, _INT, _FLOAT, _STR, _LIST, _MAPPING, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)


class _Loader(yaml.SafeLoader):
    """The safe loader, with the types and numbers that YAML 1.2 shares with JSON: 2:4 is text, not 124 in base 60,
    and 1e-3 is a number.

    Repeated keys, deep nesting, and aliases that stand for themselves or for very much are errors.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._count = 0
        self._extents: dict[int, tuple[int, int]] = {}  # by id of the node: size and depth, with aliases expanded

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        is_alias, mark = self.check_event(AliasEvent), self.peek_event().start_mark
        self._depth += 1
        self._count += 1
        if self._count > MAX_YAML_VALUES:
            problem = f"it has more than {MAX_YAML_VALUES:,} keys and values: write it as JSON, in a .json file"
            raise ComposerError(None, None, problem, mark)
        node = super().compose_node(parent, index) if self._depth <= MAX_DEPTH else None
        self._depth -= 1
        if node is None:
            raise ComposerError(None, None, f"it is nested more than {MAX_DEPTH} levels deep", mark)
        if not is_alias:
            self._extents[id(node)] = size, depth = self._extent(node)
            if size > MAX_EXPANDED or depth > MAX_DEPTH:
                raise ComposerError(None, None, "its aliases stand for too much", mark)
        elif id(node) not in self._extents:
            raise ComposerError(None, None, "an alias stands for what it is a part of", mark)
        return node

    def _extent(self, node: Node) -> tuple[int, int]:
        if isinstance(node, ScalarNode):
            return 1 + len(node.value), 0
        children = node.value
        if isinstance(node, MappingNode):
            self._check_keys(node)
            children = [child for pair in node.value for child in pair]
        sizes, depths = zip(*(self._extents[id(child)] for child in children), strict=True) if children else ((), ())
        return 1 + sum(sizes), 1 + max(depths, default=0)

    def _check_keys(self, node: MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f'the key "{key.value[:80]}" is there twice', key.start_mark)
                seen.add((key.tag, key.value))


def _checked(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Returns a constructor of scalars whose errors say where the scalar is."""

    def construct_checked(loader: _Loader, node: Node) -> Any:
        text = str(node.value)
        if node.tag == _INT and len(text) > MAX_DIGITS:
            problem = f"the number {text[:10]}... has {len(text):,} digits: at most {MAX_DIGITS} are allowed"
            raise ConstructorError(None, None, problem, node.start_mark)
        try:
            return construct(loader, node)
        except (ValueError, KeyError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f'"{text[:80]}" is no {kind}', node.start_mark) from error

    return construct_checked


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag in (_NULL, _BOOL, _MERGE)]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), [*"-+.0123456789"]
)
_constructors = yaml.SafeLoader.yaml_constructors
_Loader.yaml_constructors = {tag: _constructors[tag] for tag in (_NULL, _STR, _LIST, _MAPPING, None)}
_Loader.yaml_constructors |= {tag: _checked(_constructors[tag]) for tag in (_BOOL, _INT, _FLOAT)}


def parse_yaml(text: str) -> Any:
    """Returns the value of YAML that others wrote, in time and memory in proportion to its length.

    Raises:
        ValueError: it is malformed, has a key twice, is nested too deeply, or its aliases stand for too much.

    Example:
        >>> parse_yaml("pattern: 2:4\\nprune_every: 1e-3\\n")
        {'pattern': '2:4', 'prune_every': 0.001}
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has more than {MAX_YAML_BYTES:,} characters: write it as JSON, in a .json file")
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a recipe file: JSON if its name ends with .json, else YAML.

    Raises:
        ValueError: it cannot be read, is malformed, has a key twice, or holds something else than keys and values.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        ...     _ = file.write("pattern: 2:4\\nprune_every: 1e-3\\n")
        ...     file.flush()
        ...     read_recipe(file.name)
        {'pattern': '2:4', 'prune_every': 0.001}
    """
    try:
        is_json = Path(path).suffix.lower() == ".json"
        values = parse_json(read_text(path)) if is_json else parse_yaml(read_text(path, MAX_YAML_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"`pruning_config` {path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        held = "is empty" if values is None else f"holds {type(values).__name__}"
        raise ValueError(f"`pruning_config` {path} must hold options and their values, but {held}.")
    return values
