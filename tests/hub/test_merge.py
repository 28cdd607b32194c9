"""Edits of a person are kept; everything else is generated again."""

import pytest

from hf_sparse.hub.card.merge import (
    SECTION_END,
    SECTION_START,
    chunk_digests,
    join_chunks,
    merge_metadata,
    merge_text,
    replace_section,
    split_chunks,
    three_way_merge,
)


def section(text: str) -> str:
    return f"{SECTION_START}\n{text}\n{SECTION_END}\n"


def test_three_way_merge_by_hand():
    base = {"same": 1, "edited": 1, "deleted": 1, "dropped": 1}
    theirs = {"own": 0, "same": 1, "edited": 7, "dropped": 1}
    ours = {"same": 2, "edited": 2, "deleted": 2, "new": 2}
    assert three_way_merge(theirs, base, ours) == {"own": 0, "same": 2, "edited": 7, "new": 2}
    assert list(three_way_merge(theirs, base, ours)) == ["own", "same", "edited", "new"]
    assert three_way_merge({}, {}, ours) == ours


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "# t\n",
        "x\n# t\n\n```\n# no heading\n```\n## u\n# t\n",
        f"a\n\n{section('# s')}\nb\n# c\n",
        "# a\r\nb\r\n",
    ],
)
def test_joined_chunks_are_the_text(text):
    assert join_chunks(split_chunks(text)) == text


def test_chunks_by_hand():
    text = "intro\n# t\nx\n```\n# code\n```\n" + section("## s") + "tail\n# t\ny\n"
    assert split_chunks(text) == {
        "": "intro\n",
        "# t": "# t\nx\n```\n# code\n```\n",
        "hf_sparse": section("## s"),
        "after hf_sparse": "tail\n",
        "# t (2)": "# t\ny\n",
    }


def test_the_section_is_inserted_after_the_title_and_replaced_in_place():
    first = replace_section("\n# t\nx\n\n## u\ny\n", section("one"))
    assert first == f"\n# t\nx\n\n{section('one')}\n## u\ny\n"
    assert replace_section(first, section("two")) == first.replace("one", "two")
    moved = f"# t\nx\n\n## u\ny\n\n{section('one')}"
    assert replace_section(moved, section("two")) == moved.replace("one", "two")
    assert replace_section("no title", section("one")) == f"no title\n\n{section('one')}"


def test_merging_text_keeps_edits():
    written = replace_section(
        "# t\nold results\n\n## Description\nnothing\n\n## Data\nnothing\n\n## Versions\n1\n", section("old")
    )
    theirs = written.replace("## Description\nnothing", "## Description\nMy words").replace("## Data\nnothing\n\n", "")
    theirs += "\n## Licence\nmine\n"
    ours = replace_section(
        "# t\nnew results\n\n## Description\nnothing\n\n## Data\nnothing\n\n## Versions\n2\n", section("new")
    )
    assert merge_text(theirs, chunk_digests(written), ours) == (
        f"# t\nnew results\n\n{section('new')}\n## Description\nMy words\n\n## Versions\n2\n## Licence\nmine\n"
    )
    assert merge_text(written, chunk_digests(written), ours) == ours
    assert merge_text(theirs.replace("\n", "\r\n"), chunk_digests(written), ours).count("My words") == 1


def test_a_section_without_its_marks_is_inserted_again():
    written = replace_section("# t\nx\n\n## u\ny\n", section("old"))
    theirs = "# t\nx\n\n## u\nmine\n"
    merged = merge_text(theirs, chunk_digests(written), replace_section("# t\nx\n\n## u\ny\n", section("new")))
    assert "mine" in merged and merged.count(SECTION_START) == 1 and "new" in merged


def index(name: str, **values) -> list[dict]:
    metrics = [{"type": kind, "value": value, "name": kind} for kind, value in values.items()]
    what = {"task": {"type": "text-classification"}, "dataset": {"name": "GLUE", "type": "glue"}, "metrics": metrics}
    return [{"name": name, "results": [what]}]


def test_merging_metadata_keeps_edits():
    base = {"license": "mit", "tags": ["sparse", "2:4"], "language": ["en"], "sparsity": {"selected": 0.5}}
    base |= {"model-index": index("m", accuracy=0.5)}
    theirs = base | {"license": "apache-2.0", "tags": ["sparse", "2:4", "mine"], "widget": [{"text": "x"}]}
    theirs |= {"sparsity": {"selected": 1.0}, "model-index": index("m", accuracy=0.5, f1=0.25)}
    del theirs["language"]
    ours = {"license": "mit", "tags": ["sparse", "4x1"], "language": ["en"], "sparsity": {"selected": 0.8}}
    ours |= {"model-index": index("m", accuracy=0.75), "datasets": ["glue"]}
    assert merge_metadata(theirs, base, ours) == {
        "license": "apache-2.0",
        "tags": ["sparse", "4x1", "mine"],
        "widget": [{"text": "x"}],
        "sparsity": {"selected": 0.8},
        "model-index": index("m", accuracy=0.75, f1=0.25),
        "datasets": ["glue"],
    }
    assert merge_metadata({"tags": "mine"}, {}, {"tags": ["sparse"]})["tags"] == ["mine", "sparse"]


def test_the_section_of_a_card_with_another_start_mark_is_replaced():
    """The wording after "hf_sparse: start" may differ between versions."""
    earlier = section("one").replace(SECTION_START, "<!-- hf_sparse: start. Another wording. -->")
    assert replace_section(f"# t\n\n{earlier}", section("two")) == f"# t\n\n{section('two')}"
