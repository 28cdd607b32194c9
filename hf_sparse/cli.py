"""`hf-sparse`: thin commands, whose work lives in the rooms below. Torch is imported when a command needs it."""

import json
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
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors file, a directory with a checkpoint, or the name of a model on the Hub."),
    ],
    compare: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint made from the first, by fine-tuning say: exit with 1 unless its zeros stayed."
        ),
    ] = None,
    min_sparsity: Annotated[
        float | None, typer.Option(help="Exit with 1 unless this share of the selected weights is zero, from 0 to 1.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(help="Exit with 1 unless all selected weights hold this pattern: 2:4, 4x1, channel, channel:in."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Exit with 1 unless the weights are as pruning_report.json says.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all tensors.")] = False,
) -> None:
    """Say how much of a checkpoint is zero and in which structure, without building its model.

    Reads safetensors files part by part. Selected are the weights that pruning_report.json beside them names; without
    one, those that look prunable by name and shape. Exit codes: 0 all is well, 1 a check failed, 2 it cannot be read.
    """
    from .inspection import compare_checkpoints, inspect_checkpoint, unmet_expectations

    if compare is not None:
        if min_sparsity is not None or expect is not None or verify:
            raise ValueError(
                "--compare does not go with --min-sparsity, --expect and --verify: run them by themselves."
            )
        found = compare_checkpoints(checkpoint, compare, revision)
        lost = f"{found.total.lost:,} zeros of {checkpoint} are not zero in {compare}."
        unmet = [] if found.kept_all else [lost]
    else:
        found = inspect_checkpoint(checkpoint, revision)
        unmet = unmet_expectations(found, min_sparsity, expect, verify)
    typer.echo(json.dumps(found.to_dict() | {"unmet": unmet}, indent=2) if as_json else str(found))
    for line in unmet:
        typer.echo(f"hf-sparse: {line}", err=True)
    if unmet:
        raise typer.Exit(1)


def main() -> None:
    """The program `hf-sparse`."""
    app(prog_name="hf-sparse")
