"""The command that a card shows: that of the user's script, without secrets."""

import shlex
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

import hf_sparse
from hf_sparse.hub.card.command import command_line, format_command


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
    assert shlex.split(format_command("python run.py", given)) == ["python", "run.py", *kept]


def test_a_command_can_be_pasted_into_a_shell():
    given = ["--name", "a 'b' $c `d`", "--text", "two\nlines"]
    assert format_command("run", given) == "run --name 'a '\"'\"'b'\"'\"' $c `d`' --text $'two\\U0000000alines'"
    long = format_command("run", [f"--option_{index}={'v' * 20}" for index in range(5)])
    assert len(long.splitlines()) == 6 and shlex.split(long.replace("\\\n", " "))[1] == "--option_0=" + "v" * 20


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


def test_python_m_hf_sparse_is_shown_when_it_is_installed(monkeypatch):
    package = Path(hf_sparse.__file__).resolve().parent
    main = SimpleNamespace(__file__=str(package / "__main__.py"), __spec__=SimpleNamespace(name="hf_sparse.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [main.__file__, "prune", "model"])
    monkeypatch.setattr(
        sysconfig,
        "get_paths",
        lambda: dict.fromkeys(["stdlib", "platlib", "purelib"], package.parent) | {"scripts": "/none"},
    )
    assert command_line() == "python -m hf_sparse prune model"
    main.__file__ = str(package.parent / "another" / "__main__.py")
    assert command_line() is None
