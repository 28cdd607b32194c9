"""What a person wrote into a card stays when the card is written anew.

Three versions meet: theirs, found in the card; the last, as it was written; the fresh, that is to be written now. What
differs between theirs and the last is their edit. Text is compared chunk by chunk, from one heading to the next.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from operator import eq
from typing import Any

from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index, model_index_to_eval_results


START = "<!-- hf_sparse: start. What follows, up to hf_sparse: end, is written anew each time; write elsewhere. -->"
END = "<!-- hf_sparse: end -->"
SECTION = "hf_sparse"
"""The key of the chunk between the two."""

_BETWEEN = re.compile(rf"^{re.escape(START)}\r?\n.*?^{re.escape(END)}[ \t]*$(\r?\n)*", flags=re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def three_way(theirs: dict, last: dict, fresh: dict, same: Callable[[Any, Any], bool] = eq) -> dict:
    """Theirs, with the fresh value wherever theirs is the last one. What they took out stays out; what is new enters
    after what precedes it in `fresh`.

    Example:
        >>> theirs, last = {"a": 1, "b": "edited", "mine": 0}, {"a": 1, "b": 2, "gone": 3}
        >>> three_way(theirs, last, {"a": 9, "new": 5, "b": 9, "gone": 9})
        {'a': 9, 'new': 5, 'b': 'edited', 'mine': 0}
    """
    merged = {}
    for key, value in theirs.items():
        if key not in last or not same(value, last[key]):
            merged[key] = value
        elif key in fresh:
            merged[key] = fresh[key]
    order, previous = list(merged), None
    for key in fresh:
        if key not in theirs and key not in last:
            merged[key] = fresh[key]
            order.insert(order.index(previous) + 1 if previous is not None else len(order), key)
        previous = key if key in merged else previous
    return {key: merged[key] for key in order}


def chunks(text: str) -> dict[str, str]:
    """The text from heading to heading, under its headings; what stands between the two marks is one chunk.

    Example:
        >>> chunks("a\\n# b\\nc\\n")
        {'': 'a\\n', '# b': '# b\\nc\\n'}
    """
    found: dict[str, str] = {}
    match = _BETWEEN.search(text)
    for key, part in _parts(text, match):
        count, name = 1, key
        while name in found:
            count += 1
            name = f"{key} ({count})"
        found[name] = part
    return found


def _parts(text: str, match: re.Match | None) -> Iterator[tuple[str, str]]:
    if match is None:
        yield from _headings(text, "")
        return
    yield from _headings(text[: match.start()], "")
    yield SECTION, match.group()
    yield from _headings(text[match.end() :], f"after {SECTION}")


def _headings(text: str, key: str) -> Iterator[tuple[str, str]]:
    part, fence = "", None
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if fence is None and _HEADING.match(line):
            if part:
                yield key, part
            key, part = line.strip(), ""
        elif mark and fence is None:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = None
        part += line
    if part:
        yield key, part


def joined(parts: dict[str, str]) -> str:
    """The inverse of `chunks`: a chunk that ends in the middle of a line is ended where another follows."""
    texts = list(parts.values())
    return "".join(text if text.endswith("\n") or last else text + "\n\n" for text, last in _with_last(texts))


def _with_last(texts: list[str]) -> Iterator[tuple[str, bool]]:
    return ((text, index == len(texts) - 1) for index, text in enumerate(texts))


def with_section(text: str, section: str) -> str:
    """`text` with `section` in place of its own, or after the title where it has none."""
    parts = chunks(text)
    section = section.rstrip("\n") + "\n"
    if SECTION in parts:
        return joined(parts | {SECTION: section + ("\n" if list(parts)[-1] != SECTION else "")})
    order = list(parts)
    place = next((index for index, key in enumerate(order) if key.startswith("#")), len(order) - 1) + 1
    followed = section + ("\n" if place < len(order) else "")
    before = joined({key: parts[key] for key in order[:place]}).rstrip("\n")
    return (f"{before}\n\n" if before else "") + followed + joined({key: parts[key] for key in order[place:]})


def digests(text: str) -> dict[str, str]:
    """By which a later run knows the chunks that nobody has touched; not of the section, which is nobody else's."""
    return {key: _digest(part) for key, part in chunks(text).items() if key != SECTION}


def _digest(text: str) -> str:
    words = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def merge_text(theirs: str, last: dict[str, str], fresh: str) -> str:
    """The fresh text with their edits; `last` are the `digests` of what was written last."""
    old, new = chunks(theirs), chunks(fresh)
    if SECTION in old and SECTION in new:
        old[SECTION] = new[SECTION]
    return joined(three_way(old, last, new, lambda text, digest: _digest(text) == digest))


def merge_metadata(theirs: dict[str, Any], last: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The fresh metadata with their edits: of lists (tags) item by item, of results by what was measured on what."""
    merged = three_way(theirs, last, fresh)
    versions = (theirs, last, fresh)
    for key in theirs.keys() & fresh.keys():
        if key == "model-index":
            merged[key] = _merge_results(*(version.get(key) for version in versions))
        elif isinstance(fresh[key], list) and all(isinstance(item, str) for item in fresh[key]):
            merged[key] = list(three_way(*(dict.fromkeys(_names(version.get(key))) for version in versions)))
    return merged | {key: fresh[key] for key in ("sparsity",) if key in fresh}


def _names(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _merge_results(theirs: list, last: list | None, fresh: list) -> list:
    """What was measured anew replaces what was; results that others added stay."""
    (name, old), (last_name, previous), (fresh_name, new) = (_results(index) for index in (theirs, last, fresh))
    results = three_way(old, previous, new) | new
    return eval_results_to_model_index(fresh_name if name == last_name else name, list(results.values()))


def _results(index: list | None) -> tuple[str | None, dict[str, EvalResult]]:
    name, results = model_index_to_eval_results(index) if index else (None, [])
    return name, {_measured(result): result for result in results}


def _measured(result: EvalResult) -> str:
    """All but the value."""
    return json.dumps({**vars(result), "metric_value": None, "verify_token": None}, sort_keys=True, default=str)
