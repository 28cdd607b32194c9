"""Text of others is shown literally, and secrets are removed."""

import pytest
from markdown_it import MarkdownIt

from hf_sparse.hub.card.escaping import REMOVED, code_block, escape, remove_secrets


NASTY = [
    "a|b",
    "`code` ``more``",
    "<script>alert(1)</script>",
    "<!-- a --> & &lt;",
    "{{ 7 * 7 }} {% raw %}",
    "*bold* _soft_ ~~gone~~ [link](http://x) ![image](y)",
    "back\\slash \\| $x$",
    "snake_case.weight",
    "http://a.example/b https://a.example HTTPS://A.EXAMPLE (ftp://a.example) x:http://a.example/?q=1",
    "mailto:a@b.example a.b-c@d.example xmpp:a@b.example",
    "www.a.example WWW.a.example",
    "user/model:main a://b 12:30 @user",
]


@pytest.mark.parametrize("text", NASTY)
def test_escaped_text_is_shown_literally(text):
    """As a renderer of Markdown shows it: in a paragraph, in a heading, and in one cell of a table."""
    markdown = MarkdownIt("gfm-like")  # makes links of bare addresses
    for source in (escape(text), f"# {escape(text)}", f"| x | y |\n|---|---|\n| {escape(text)} | 1 |"):
        tokens = [
            token
            for token in markdown.parse(source)
            if token.type == "inline" and token.content not in ("x", "y", "1")
        ]
        assert len(tokens) == 1, tokens
        shown = tokens[0].children
        assert {token.type for token in shown} <= {"text", "text_special"}, shown
        assert "".join(token.content for token in shown) == text


def test_an_address_on_www_is_no_link():
    """The extension for bare addresses of GitHub's Markdown asks for "www." at the start of a word."""
    assert escape("see www.a.example") == "see www\\.a.example"


def test_text_is_one_line():
    assert escape("a\nb\r\n\t# c\x00\u2028d") == "a b # c d"
    assert escape(7) == "7" and escape("GLUE SST2 snip_80") == "GLUE SST2 snip_80"


def test_a_fence_is_longer_than_what_it_holds():
    assert code_block("a\n```\nb\n", "yaml") == "````yaml\na\n```\nb\n````"


def test_secrets_are_removed_from_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-environment")
    text = "a secret-of-the-environment b given-secret c https://me:hf_abcdefghijklmnopqrst@hub d"
    assert remove_secrets(text, ["given-secret", None]) == f"a {REMOVED} b {REMOVED} c https://me:{REMOVED}@hub d"
    monkeypatch.setenv("HF_TOKEN", "any")
    assert remove_secrets("many of any, hf_sparse") == "many of any, hf_sparse"


def test_a_token_is_removed_where_it_is_glued_to_a_word():
    token = "hf_" + "aB3" * 11
    for text in (
        f"my{token}",
        f"run_{token}",
        f"1{token}.json",
        f"{token}_v2",
        f"a-{token}/b",
        f"x_api_org_{'a' * 34}",
    ):
        assert token not in remove_secrets(text) and "a" * 34 not in remove_secrets(text), text
        assert REMOVED in remove_secrets(text)
    assert remove_secrets("hf_sparse half_trained_model hf_internal_testing") == (
        "hf_sparse half_trained_model hf_internal_testing"
    )
