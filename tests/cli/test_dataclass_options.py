"""A dataclass as options: flags, lists, JSON, defaults, and what the help shows."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import typer

from hf_sparse.cli.dataclass_options import dataclass_command


@dataclass
class Options:
    """Options of the test.

    More text.
    """

    source: str | None = field(default=None, metadata={"help": "The source."})
    num_steps: int = field(default=128, metadata={"help": "Number of steps."})
    quiet: bool = field(default=False, metadata={"help": "Print less."})
    in_order: bool | None = field(default=None, metadata={"help": "Keep the order."})
    targets: list[str] | None = field(default=None, metadata={"help": "Names.", "metavar": "GLOB"})
    method_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Options of the method."})
    shares: dict[str, Any] | str | None = field(default=None, metadata={"help": "Parsed by the dataclass."})

    defaults: ClassVar[dict[str, Any]] = {"in_order": True}


@pytest.fixture
def run(capsys):
    def run_program(*words):
        given = []

        def command(options: Options) -> None:
            """What it does."""
            given.append(options)

        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command()(dataclass_command((Options,), command, ("source",)))
        with pytest.raises(SystemExit) as done:
            app([*map(str, words)])
        return done.value.code, given, *capsys.readouterr()

    return run_program


def test_values_of_every_type(run):
    assert run()[:2] == (0, [Options()])
    words = ["x", "--num-steps", 3, "--quiet", "--no-in-order", "--targets", "a", "--targets", "b"]
    words += ["--method-kwargs", '{"rho": 0.1}', "--shares", '{"a": 1}']
    assert run(*words)[:2] == (0, [Options("x", 3, True, False, ["a", "b"], {"rho": 0.1}, '{"a": 1}')])


@pytest.mark.parametrize(
    "text, reason", [("{", "is not JSON: Expecting property name"), ("[1]", "is not a JSON object")]
)
def test_json_that_is_no_object_is_refused(run, text, reason):
    code, given, _, err = run("--method-kwargs", text)
    assert (code, given) == (2, []) and "--method-kwargs" in err and reason in err


def test_help_shows_defaults_and_what_values_look_like(run):
    code, _, out, _ = run("--help")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith("--")}
    assert code == 0 and "What it does." in out
    assert "128" in lines["--num-steps"]
    assert "GLOB" in lines["--targets"] and "JSON" in lines["--method-kwargs"] and "JSON" in lines["--shares"]
    assert "--in-order" in out and "--no-in-order" in out and "--no-quiet" not in out
