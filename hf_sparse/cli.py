"""`hf-sparse`: thin commands, whose work lives in the rooms below. Torch is imported when a command needs it."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup


class _OneLineErrors(TyperGroup):
    """What users can mend is one line on stderr and exit code 2; everything else is a bug and shows itself."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head`, which click knows how to end
            raise
        except (ValueError, OSError) as error:
            typer.echo(f"hf-sparse: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Prune, inspect and publish Hugging Face models."""


@app.command()
def report(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file, or a directory with model.safetensors.")],
) -> None:
    """Say how much of a checkpoint is zero, without building its model."""
    from .inspection import count_by_tensor

    path = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    for name, (zeros, values) in count_by_tensor(path).items():
        typer.echo(f"{name}: {zeros:,} of {values:,} are zero")


def main() -> None:
    """The program `hf-sparse`."""
    app(prog_name="hf-sparse")
