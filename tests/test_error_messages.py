"""Error messages name options in backticks, as `scope` or `scope="row"`: the command line replaces exactly these."""

import ast
import dataclasses
import re
from pathlib import Path

import hf_sparse
from hf_sparse import OneshotConfig, SparseTrainingArguments
from hf_sparse.cli.catalogue import read_catalogue
from hf_sparse.oneshot import OneshotArguments


PACKAGE = Path(hf_sparse.__file__).parent
OPTIONS = {
    field.name
    for cls in (SparseTrainingArguments, OneshotConfig, OneshotArguments)
    for field in dataclasses.fields(cls)
}
OPTIONS |= {option.name for family in read_catalogue(None) for method in family.methods for option in method.options}
# Options of several words: others are also ordinary nouns.
BARE = re.compile(
    rf"(?<![\w.\"'/])(?:{'|'.join(sorted(name for name in OPTIONS if '_' in name.strip('_')))})(?![\w\"'/]|\.\w)"
)


def bare_options(source: str) -> list[str]:
    """Returns the options outside backticks in messages that are raised, yielded, or appended to `errors`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        is_append = isinstance(node, ast.Call) and ast.unparse(node.func) == "errors.append"
        if isinstance(node, (ast.Raise, ast.Yield)) or is_append:
            found += [f"{node.lineno}: {text}" for text in _texts(node) if BARE.search(re.sub("`[^`]*`", "", text))]
    return found


def _texts(node: ast.AST) -> list[str]:
    """The strings of several words in a node, with {} in place of expressions."""
    joined = [each for each in ast.walk(node) if isinstance(each, ast.JoinedStr)]
    parts = {part for each in joined for part in each.values}
    plain = [each for each in ast.walk(node) if _is_text(each) and each not in parts]
    texts = ["".join(part.value if _is_text(part) else "{}" for part in each.values) for each in joined]
    return [text for text in texts + [each.value for each in plain] if " " in text]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_options_are_in_backticks():
    bare = {path.name: found for path in PACKAGE.rglob("*.py") if (found := bare_options(path.read_text()))}
    assert not bare


def test_options_outside_backticks_are_found():
    assert bare_options('raise ValueError(f"target_sparsity is {value}: lower it.")')
    assert bare_options('errors.append("give a target_sparsity " f"of {value}.")')
    assert not bare_options('raise ValueError(f"`target_sparsity` is {value}: use `target_sparsity=0.5`.")')
    assert not bare_options('raise ValueError("pruning_config.json is damaged.")')
