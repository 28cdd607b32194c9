"""`hf-sparse`: thin commands, whose work lives in the rooms below. Torch is imported when a command needs it."""

import json
import os
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
    from ..inspection import compare_checkpoints, inspect_checkpoint, unmet_expectations

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


@app.command()
def card(
    directory: Annotated[
        str, typer.Argument(help="The folder of a pruned model, with pruning_report.json and pruning_config.json.")
    ],
    repo: Annotated[
        str | None,
        typer.Option(help="Where it is going to be uploaded: what people changed in the card there is taken over."),
    ] = None,
) -> None:
    """Write the model card of a pruned model anew, from the files beside its weights.

    The zeros are counted in the weights. Only what stands between the two marks of hf_sparse is replaced, and of the
    metadata what nobody else has changed.
    """
    from ..hub.card import rewrite_card

    typer.echo(rewrite_card(directory, repo))


@app.command()
def push(
    directory: Annotated[str, typer.Argument(help="The folder: of a trainer, one of its checkpoints, or any model.")],
    repo: Annotated[str, typer.Argument(help='"user/name", or "name" under your own. Made where there is none.')],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to.")] = None,
    path_in_repo: Annotated[
        str | None, typer.Option(help="The folder in the repository; its root if left out.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token_from_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The variable with the token, if not HF_TOKEN or that of `hf auth login`."),
    ] = None,
) -> None:
    """Upload a folder to the Hub and print the address. Checkpoints inside are left out: push them by themselves.

    The card of a pruned model is written anew before, as by `hf-sparse card --repo`, where it goes to "user/name".
    Tried again where the Hub is busy or out of reach. Exit codes: 0 uploaded, 1 it failed, 2 there is no such folder.
    """
    from ..hub.card import has_card_files, rewrite_card
    from ..hub.upload import UploadError
    from ..hub.upload import push as upload

    token = None if token_from_env is None else os.environ.get(token_from_env)
    if token_from_env is not None and not token:
        raise ValueError("--token-from-env: there is no such variable. It takes the name of one, never the token.")
    where = {"private": private or None, "revision": revision, "path_in_repo": path_in_repo}
    if has_card_files(directory) and "/" in repo and not path_in_repo:
        rewrite_card(directory, repo, token)
    try:
        typer.echo(upload(directory, repo, message=message, token=token, **where).repo_url)
    except UploadError as error:
        typer.echo(f"hf-sparse: {error}", err=True)
        raise typer.Exit(1) from error


# Options come from dataclasses that need torch, so they are read when the command is called.
@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def prune(context: typer.Context) -> None:
    """Prune a pretrained model without training, from calibration data."""
    from ..oneshot import OneshotArguments, OneshotConfig, run_oneshot
    from .dataclass_options import as_dashed, dataclass_command

    def run(job: OneshotArguments, config: OneshotConfig) -> None:
        """Prune a pretrained model without training, from calibration data, block by block.

        Wanda, unless a criterion or a solver says otherwise; SparseGPT with --solver sparsegpt. Killed and started
        again in the same way, it goes on after the last finished block. Exit codes: 0 done, 2 it cannot be done.
        """
        run_oneshot(job, config, say=typer.echo)

    whole = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    whole.command(context_settings={"token_normalize_func": as_dashed})(
        dataclass_command((OneshotArguments, OneshotConfig), run, ("model_name_or_path", "output_dir"))
    )
    code = typer.main.get_command(whole).main(
        context.args, prog_name=context.command_path, standalone_mode=False, windows_expand_args=False
    )
    raise typer.Exit(code or 0)


def main() -> None:
    """The program `hf-sparse`."""
    app(prog_name="hf-sparse")
