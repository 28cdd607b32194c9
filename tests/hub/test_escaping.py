"""What others wrote stays text, and secrets stay out."""

import shlex
import sys
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

from hf_sparse.hub.card.escaping import REMOVED, command, command_line, escape, fenced, without_secrets


NASTY = [
    "a|b",
    "`code` ``more``",
    "<script>alert(1)</script>",
    "<!-- a --> & &lt;",
    "{{ 7 * 7 }} {% raw %}",
    "*bold* _soft_ ~~gone~~ [link](http://x) ![image](y)",
    "back\\slash \\| $x$",
    "snake_case.weight",
]


@pytest.mark.parametrize("text", NASTY)
def test_text_reads_as_it_was_written(text):
    """As a renderer of Markdown shows it: in a paragraph, in a heading, and in one cell of a table."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
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


def test_text_is_one_line():
    assert escape("a\nb\r\n\t# c\x00\u2028d") == "a b # c d"
    assert escape(7) == "7" and escape("GLUE SST2 snip_80") == "GLUE SST2 snip_80"


def test_a_fence_is_longer_than_what_it_holds():
    assert fenced("a\n```\nb\n", "yaml") == "````yaml\na\n```\nb\n````"


@pytest.mark.parametrize(
    "given, kept",
    [
        (["--hub_token", "abc", "--x", "1"], ["--x", "1"]),
        (["--hub_token=abc", "--token", "t", "--token=t", "--hub-token", "abc"], []),
        (["--push_to_hub_token", "abc", "--api_key", "k", "--password=p"], []),
        (["--token", "--do_train"], ["--do_train"]),
        (
            ["--tokenizer_name", "n", "--max_tokens_per_row", "5"],
            ["--tokenizer_name", "n", "--max_tokens_per_row", "5"],
        ),
    ],
)
def test_options_that_hold_secrets_are_left_out_of_a_command(given, kept):
    assert shlex.split(command("python run.py", given)) == ["python", "run.py", *kept]


def test_a_command_can_be_pasted_into_a_shell():
    given = ["--name", "a 'b' $c `d`", "--text", "two\nlines"]
    assert command("run", given) == "run --name 'a '\"'\"'b'\"'\"' $c `d`' --text $'two\\U0000000alines'"
    long = command("run", [f"--option_{index}={'v' * 20}" for index in range(5)])
    assert len(long.splitlines()) == 6 and shlex.split(long.replace("\\\n", " "))[1] == "--option_0=" + "v" * 20


def test_secrets_leave_any_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-environment")
    text = "a secret-of-the-environment b given-secret c https://me:hf_abcdefghijklmnopqrst@hub d"
    assert without_secrets(text, ["given-secret", None]) == f"a {REMOVED} b {REMOVED} c https://me:{REMOVED}@hub d"
    monkeypatch.setenv("HF_TOKEN", "any")
    assert without_secrets("many of any, hf_sparse") == "many of any, hf_sparse"


def test_the_command_is_that_of_a_script(tmp_path, monkeypatch):
    assert command_line() is None  # this is a test
    script = tmp_path / "my script.py"
    script.touch()
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(script), __spec__=None))
    monkeypatch.setattr(sys, "argv", [str(script), "--x", "1", "--hub_token", "abc"])
    assert command_line() == "python 'my script.py' --x 1"
    monkeypatch.chdir(tmp_path.parent)
    assert command_line() == f"python '{tmp_path.name}/my script.py' --x 1"
    monkeypatch.setitem(
        sys.modules, "__main__", SimpleNamespace(__file__=str(script), __spec__=SimpleNamespace(name="pkg.__main__"))
    )
    assert command_line() == "python -m pkg --x 1"
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())  # a notebook
    assert command_line() is None
