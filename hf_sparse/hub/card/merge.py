"""Three-way merge of model cards, so that a regenerated card keeps the edits of a person.

As in git, `base` is the card as it was generated last, `theirs` is that card with the edits of a person, and `ours` is
the card as it is generated now. Text is merged by chunks, which extend from one heading to the next; of each chunk of
`base` a digest is enough.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import eq
from typing import Any

from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index, model_index_to_eval_results


SECTION_START = "<!-- hf_sparse: start. This section, up to hf_sparse: end, is regenerated: write outside of it. -->"
SECTION_END = "<!-- hf_sparse: end -->"
SECTION = "hf_sparse"
"""The key of the chunk from SECTION_START to SECTION_END."""

_START_PATTERN = re.compile(r"^<!-- hf_sparse: start\b[^\n]*-->\r?\n", flags=re.MULTILINE)
_END_PATTERN = re.compile(rf"^{re.escape(SECTION_END)}[ \t]*$(\r?\n)*", flags=re.MULTILINE)
_HEADING_PATTERN = re.compile(r" {0,3}#{1,6}(\s|$)")
_FENCE_PATTERN = re.compile(r" {0,3}(`{3,}|~{3,})")


def three_way_merge(
    theirs: Mapping[str, Any],
    base: Mapping[str, Any],
    ours: Mapping[str, Any],
    is_same: Callable[[Any, Any], bool] = eq,
) -> dict[str, Any]:
    """Merges mappings: values that `theirs` left as in `base` become those of `ours`.

    Keys that `theirs` removed stay removed. A key that only `ours` has is inserted after the key before it in `ours`.

    `is_same` compares a value of `theirs` with the value in `base`.

    Example:
        >>> theirs, base = {"a": 1, "b": "edited", "added": 0}, {"a": 1, "b": 2, "removed": 3}
        >>> three_way_merge(theirs, base, {"a": 9, "new": 5, "b": 9, "removed": 9})
        {'a': 9, 'new': 5, 'b': 'edited', 'added': 0}
    """
    merged = {}
    for key, value in theirs.items():
        if key not in base or not is_same(value, base[key]):
            merged[key] = value
        elif key in ours:
            merged[key] = ours[key]
    order, previous = list(merged), None
    for key in ours:
        if key not in theirs and key not in base:
            merged[key] = ours[key]
            order.insert(order.index(previous) + 1 if previous is not None else len(order), key)
        previous = key if key in merged else previous
    return {key: merged[key] for key in order}


def split_chunks(text: str) -> dict[str, str]:
    """Splits a text at its headings and around the hf_sparse section.

    Returns: heading -> text from this heading to the next, in order. The key of the text before the first heading is
    "", that of the section is `SECTION`, that of the text between the section and the next heading is "after
    hf_sparse". Repeated keys are numbered.

    Example:
        >>> split_chunks("a\\n# b\\nc\\n")
        {'': 'a\\n', '# b': '# b\\nc\\n'}
    """
    section = _find_section(text)
    parts = list(_split_at_headings(text[: section.start] if section else text, ""))
    if section:
        parts += [(SECTION, text[section]), *_split_at_headings(text[section.stop :], f"after {SECTION}")]
    chunks: dict[str, str] = {}
    for key, part in parts:
        numbered = (f"{key} ({number})" for number in itertools.count(2))
        chunks[key if key not in chunks else next(name for name in numbered if name not in chunks)] = part
    return chunks


def _find_section(text: str) -> slice | None:
    """Returns where the hf_sparse section is. An end mark in a code block, which shows it, does not end the section,
    unless there is no other."""
    start = _START_PATTERN.search(text)
    if start is None:
        return None
    ends = list(_END_PATTERN.finditer(text, start.end()))
    if not ends:
        return None
    lines, position, outside = _lines_with_fences(text[start.end() :]), start.end(), set()
    for line, is_code in lines:
        if not is_code:
            outside.add(position)
        position += len(line)
    end = next((end for end in ends if end.start() in outside), ends[0])
    return slice(start.start(), end.end())


def _lines_with_fences(text: str) -> Iterator[tuple[str, bool]]:
    """Yields each line, and whether it belongs to a code block; the fence that opens one does."""
    fence: str | None = None
    for line in text.splitlines(keepends=True):
        match, is_code = _FENCE_PATTERN.match(line), fence is not None
        if match and fence is None:
            fence, is_code = match[1], True
        elif match and fence and match[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = None
        yield line, is_code


def _split_at_headings(text: str, key: str) -> Iterator[tuple[str, str]]:
    """Yields (heading, text) pairs; `key` stands for the heading of the text before the first one."""
    part = ""
    for line, is_code in _lines_with_fences(text):
        if not is_code and _HEADING_PATTERN.match(line):
            if part:
                yield key, part
            key, part = line.strip(), ""
        part += line
    if part:
        yield key, part


def join_chunks(chunks: Mapping[str, str]) -> str:
    """The inverse of `split_chunks`. A chunk that does not end with a line break is completed if another follows."""
    *texts, last = list(chunks.values()) or [""]
    return "".join(text if text.endswith("\n") else text + "\n\n" for text in texts) + last


def replace_section(text: str, section: str) -> str:
    """Replaces the hf_sparse section of a text, or inserts it after the title if there is none."""
    chunks = split_chunks(text)
    section = section.rstrip("\n") + "\n"
    if SECTION in chunks:
        return join_chunks(chunks | {SECTION: section + ("\n" if list(chunks)[-1] != SECTION else "")})
    keys = list(chunks)
    position = next((index for index, key in enumerate(keys) if key.startswith("#")), len(keys) - 1) + 1
    before = join_chunks({key: chunks[key] for key in keys[:position]}).rstrip("\n")
    after = join_chunks({key: chunks[key] for key in keys[position:]})
    return (f"{before}\n\n" if before else "") + section + ("\n" + after if position < len(keys) else "")


def chunk_digests(text: str) -> dict[str, str]:
    """Returns the digest of every chunk of `text` except the hf_sparse section, which is always replaced."""
    return {key: _digest(chunk) for key, chunk in split_chunks(text).items() if key != SECTION}


def _digest(text: str) -> str:
    stripped = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(stripped.encode()).hexdigest()[:16]


def merge_text(theirs: str, base_digests: Mapping[str, str], ours: str) -> str:
    """Merges the texts of cards by chunks. `base_digests`: `chunk_digests` of the text as it was generated last."""
    their_chunks, our_chunks = split_chunks(theirs), split_chunks(ours)
    if SECTION in their_chunks and SECTION in our_chunks:
        their_chunks[SECTION] = our_chunks[SECTION]
    return join_chunks(
        three_way_merge(their_chunks, base_digests, our_chunks, is_same=lambda text, digest: _digest(text) == digest)
    )


def merge_metadata(theirs: Mapping[str, Any], base: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the metadata of cards: lists such as tags by item, results by task, data set and metric.

    The "sparsity" of `ours` always replaces that of `theirs`.
    """
    merged = three_way_merge(theirs, base, ours)
    for key in theirs.keys() & ours.keys():
        if key == "model-index":
            merged[key] = _merge_results(theirs[key], base.get(key), ours[key])
        elif isinstance(ours[key], list) and all(isinstance(item, str) for item in ours[key]):
            items = [dict.fromkeys(_as_strings(version.get(key))) for version in (theirs, base, ours)]
            merged[key] = list(three_way_merge(items[0], items[1], items[2]))
    return merged | {key: ours[key] for key in ("sparsity",) if key in ours}


def _as_strings(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _merge_results(theirs: Sequence[Any], base: Sequence[Any] | None, ours: Sequence[Any]) -> list[dict[str, Any]]:
    """Replaces the results that were measured again; results that a person added stay."""
    (their_name, their_results), (base_name, base_results) = _results_by_key(theirs), _results_by_key(base)
    our_name, our_results = _results_by_key(ours)
    merged = three_way_merge(their_results, base_results, our_results) | our_results
    name = our_name if their_name == base_name else their_name
    return eval_results_to_model_index(name or "", list(merged.values()))


def _results_by_key(model_index: Sequence[Any] | None) -> tuple[str | None, dict[str, EvalResult]]:
    """Returns the model name and the results of a model index, under all their fields but the measured value."""
    name, results = model_index_to_eval_results(list(model_index)) if model_index else (None, [])
    return name, {
        json.dumps({**vars(result), "metric_value": None, "verify_token": None}, sort_keys=True, default=str): result
        for result in results
    }
