"""The commands of `hf-sparse`. Torch is imported when a command needs it, so that `--help` is quick."""

import json
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..hub.card_metadata import HELP
from ..import_hooks import hidden_package
from .deployment import NumberListCommand, bench, export, shrink
from .mistakes import MISTAKES, format_mistake, is_internal, print_mistake
from .plugins import Plugins, load_plugins
from .prune import load_prune_command, prune


_UsageError: Any = typer.BadParameter.__base__  # of click, which typer includes under a private name
_COMMAND = f"{__name__}.command"
"""The key of the running command in what its context shares."""


class _Commands(TyperGroup):
    """Prints errors that users can correct on one line, with exit code 2. Other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with hidden_package("deepspeed"):  # accelerate would import it, which takes seconds and logs what it finds
                return super().invoke(ctx)
        except BrokenPipeError:  # click handles the end of a pipe, as in `| head`
            raise
        except _UsageError as error:
            message = " ".join(error.format_message().split())
            cause = error
        except MISTAKES as error:
            if is_internal(error):
                raise
            message, cause = format_mistake(error, _typed_options(ctx.meta.get(_COMMAND))), error
        print_mistake(f"hf-sparse: {message}")
        raise typer.Exit(2) from cause

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Returns the command that runs, or completes its options: only then those of `prune` are read."""
        name, command, rest = super().resolve_command(ctx, args)
        command = ctx.meta[_COMMAND] = load_prune_command() if name == prune.__name__ else command
        return name, command, rest


def _typed_options(command: Any) -> dict[str, str]:
    """Returns the names of the options and arguments of a command, and how they are typed."""
    typed = {param.name: param.opts[0] for param in getattr(command, "params", ())}
    return {name: option if option.startswith("--") else name.upper() for name, option in typed.items()}


AllLayers = Annotated[
    bool,
    typer.Option("--all-layers", help="Show a row for each layer, also where many are grouped by kind and block."),
]

app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


BaseModel = Annotated[str | None, typer.Option(help=HELP["base_model"])]
License = Annotated[str | None, typer.Option(help=HELP["license"])]
Datasets = Annotated[list[str] | None, typer.Option(help=f"{HELP['datasets']} Repeat it for several.")]
PipelineTag = Annotated[str | None, typer.Option(help=HELP["pipeline_tag"])]


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hf_sparse {__version__}")
        raise typer.Exit()


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Prune, inspect and publish Hugging Face models."""


@app.command()
def report(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors file, a folder with a checkpoint, or the name of a model on the Hub."),
    ],
    min_sparsity: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if the sparsity of the selected weights, from 0 to 1, is lower than this."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            help="Exit with 1 if a selected weight does not have this pattern: 2:4, 4x1, channel, channel:in."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Exit with 1 if the weights do not agree with pruning_report.json.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    all_layers: AllLayers = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all tensors.")] = False,
) -> None:
    """Report the sparsity of a checkpoint and the structure of its zeros, without building its model.

    Safetensors files are read part by part. The selected weights are those in pruning_report.json beside them; without
    that file, those that look prunable by name and shape. Exit codes: 0 success, 1 a check failed, 2 unreadable.
    """
    from ..inspection import inspect_checkpoint, unmet_expectations

    contents = inspect_checkpoint(checkpoint, revision)
    unmet = unmet_expectations(contents, min_sparsity, expect, verify)
    _print_checked(contents, unmet, as_json, all_layers)


@app.command()
def compare(
    first: Annotated[
        str,
        typer.Argument(help="A .safetensors file, a folder with a checkpoint, or the name of a model on the Hub."),
    ],
    second: Annotated[str, typer.Argument(help="The same of the checkpoint to compare with it.")],
    keeps_zeros: Annotated[
        bool,
        typer.Option("--keeps-zeros", help="Exit with 1 if selected weights that are zero in the first are not zero."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the first on the Hub.")] = None,
    second_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the second.")] = None,
    all_layers: AllLayers = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two checkpoints of a model: parameters, zeros, file size, metrics of their cards, and each weight.

    For example a model before and after pruning, or a pruned model before and after fine-tuning. Exit codes:
    0 success, 1 zeros were lost and --keeps-zeros was given, 2 they cannot be read or compared.
    """
    from ..inspection import compare_checkpoints

    comparison = compare_checkpoints(first, second, revision, second_revision)
    lost = f"{comparison.total.lost:,} zeros of {first} are not zero in {second}."
    _print_checked(comparison, [lost] if keeps_zeros and not comparison.kept_all else [], as_json, all_layers)


def _print_checked(result: Any, unmet: list[str], as_json: bool, all_layers: bool) -> None:
    """Prints a result as tables or JSON, and the checks that failed. Exits with 1 if there are some."""
    from ..reporting.tabular import console_text

    values = result.to_dict() | {"unmet": unmet}
    typer.echo(json.dumps(values, indent=2) if as_json else console_text(result, all_layers or None))
    for line in unmet:
        typer.echo(f"hf-sparse: {line}", err=True)
    if unmet:
        raise typer.Exit(1)


@app.command()
def methods(
    family: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="List only the methods of one option, such as criterion."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with a description of each option.")] = False,
    plugin: Plugins = None,
) -> None:
    """List the methods of pruning and training: what each does, its options and their defaults, and its paper.

    A method is selected by the option of its family, as in `--criterion snip_momentum`; its own options are given as
    JSON, as in `--criterion_kwargs '{"decay": 0.95}'`. Terms of the `loss` with a teacher follow
    from the task. Methods of plug-ins are listed as well.
    """
    from .catalogue import read_catalogue
    from .methods import print_catalogue

    load_plugins(plugin)
    families = read_catalogue(family)
    if as_json:
        typer.echo(json.dumps({"families": [found.to_dict() for found in families]}, indent=2, ensure_ascii=False))
    else:
        print_catalogue(families)


@app.command()
def card(
    directory: Annotated[
        str, typer.Argument(help="Folder of a pruned model, with pruning_report.json and pruning_config.json.")
    ],
    repo: Annotated[
        str | None,
        typer.Option(help="Repository of the model on the Hub. Edits that were made to its card there are kept."),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="Output of `bench --json` that includes this folder: the card shows the measured times."),
    ] = None,
    base_model: BaseModel = None,
    license: License = None,  # noqa: A002 - the Hub's name
    datasets: Datasets = None,
    pipeline_tag: PipelineTag = None,
    plugin: Plugins = None,
) -> None:
    """Rewrite the model card of a pruned model from the files beside its weights.

    Zeros are counted in the weights. Only the section between the markers of hf_sparse is replaced, and metadata that
    was not edited, or that the options give.
    """
    from ..hub.card import CardMetadata, rewrite_card

    given = CardMetadata(base_model, license, datasets, pipeline_tag)
    load_plugins(plugin)
    typer.echo(rewrite_card(directory, repo, benchmark=benchmark, given=given))


@app.command()
def push(
    directory: Annotated[
        str, typer.Argument(help="Output folder of a trainer, one of its checkpoints, or the folder of any model.")
    ],
    repo: Annotated[
        str, typer.Argument(help='"user/name", or "name" for your own account. Created if it does not exist.')
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is created.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    path_in_repo: Annotated[str | None, typer.Option(help="Folder in the repository. Default: its top level.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    token_from_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the token. Default: HF_TOKEN, or the token of `hf auth login`.",
        ),
    ] = None,
    base_model: BaseModel = None,
    license: License = None,  # noqa: A002 - the Hub's name
    datasets: Datasets = None,
    pipeline_tag: PipelineTag = None,
    plugin: Plugins = None,
) -> None:
    """Upload a folder to the Hub and print its URL. Checkpoints in subfolders are not uploaded: push each separately.

    If `repo` is "user/name", the card of a pruned model is rewritten first, as by `hf-sparse card --repo`, unless
    --path-in-repo is given; if the upload fails, the folder stays as it was. Transient failures are retried. Exit
    codes: 0 uploaded, 1 the upload failed, 2 there is no such folder.
    """
    from ..hub.card import CardMetadata, push_with_card
    from ..hub.upload import UploadError

    token = os.environ.get(token_from_env) if token_from_env else None
    if token_from_env is not None and not token:
        raise ValueError(
            "--token-from-env takes the name of an environment variable, never the token itself: there is no variable "
            "of this name, or it is empty."
        )
    given = CardMetadata(base_model, license, datasets, pipeline_tag)
    load_plugins(plugin)
    try:
        options = {"revision": revision, "path_in_repo": path_in_repo, "message": message, "token": token}
        commit = push_with_card(directory, repo, given, private=private or None, **options)
    except UploadError as error:
        typer.echo(f"hf-sparse: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(commit.repo_url)


app.command()(prune)
app.command()(shrink)
app.command()(export)
app.command(cls=NumberListCommand)(bench)


def main() -> None:
    """Runs the program `hf-sparse`."""
    app(prog_name="hf-sparse")
