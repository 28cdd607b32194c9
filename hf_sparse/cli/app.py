"""The commands of `hf-sparse`. Torch is imported when a command needs it, so that `--help` is quick."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .deployment import NumberListCommand, bench, export, shrink


class _OneLineErrors(TyperGroup):
    """Prints errors that users can correct on one line, with exit code 2. Other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click handles the end of a pipe, as in `| head`
            raise
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"hf-sparse: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


_PLUGIN_HELP = (
    "Python file or module that registers criteria, patterns or other methods of your own. Repeat it for several. It "
    "runs with your permissions."
)
Plugins = Annotated[list[str] | None, typer.Option(metavar="FILE_OR_MODULE", help=_PLUGIN_HELP)]


@dataclass
class PluginArguments:
    """Plug-ins: methods of your own."""

    plugin: list[str] | None = field(default=None, metadata={"help": _PLUGIN_HELP, "metavar": "FILE_OR_MODULE"})

    def __post_init__(self) -> None:
        _load_plugins(self.plugin)


def _load_plugins(plugins: Iterable[str] | None) -> None:
    from ..plugins import load_plugin

    for plugin in plugins or ():
        load_plugin(plugin)


@app.callback()
def _commands() -> None:
    """Prune, inspect and publish Hugging Face models."""


@app.command()
def report(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors file, a folder with a checkpoint, or the name of a model on the Hub."),
    ],
    compare: Annotated[
        str | None,
        typer.Option(
            help="Second checkpoint, such as the first after fine-tuning. Exit with 1 if it lost zeros of the first."
        ),
    ] = None,
    min_sparsity: Annotated[
        float | None,
        typer.Option(help="Least sparsity of the selected weights, from 0 to 1. Exit with 1 if it is lower."),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option(
            help="Pattern of all selected weights: 2:4, 4x1, channel, channel:in. Exit with 1 if one does not have it."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Exit with 1 if the weights do not agree with pruning_report.json.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="A row for each layer, also where many are grouped by kind and block.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all tensors.")] = False,
) -> None:
    """Report the sparsity of a checkpoint and the structure of its zeros, without building its model.

    Reads safetensors files part by part. The selected weights are those in pruning_report.json beside them; without
    one, those that look prunable by name and shape. Exit codes: 0 success, 1 a check failed, 2 it cannot be read.
    """
    from ..inspection import compare_checkpoints, inspect_checkpoint, unmet_expectations
    from ..reporting.tabular import Tabular, console_text

    result: Tabular
    if compare is not None:
        if min_sparsity is not None or expect is not None or verify:
            raise ValueError("--compare excludes --min-sparsity, --expect and --verify: run them by themselves.")
        result = comparison = compare_checkpoints(checkpoint, compare, revision)
        values = comparison.to_dict()
        lost = f"{comparison.total.lost:,} zeros of {checkpoint} are not zero in {compare}."
        unmet = [] if comparison.kept_all else [lost]
    else:
        result = contents = inspect_checkpoint(checkpoint, revision)
        values = contents.to_dict()
        unmet = unmet_expectations(contents, min_sparsity, expect, verify)
    shown = json.dumps(values | {"unmet": unmet}, indent=2) if as_json else console_text(result, all_layers or None)
    typer.echo(shown)
    for line in unmet:
        typer.echo(f"hf-sparse: {line}", err=True)
    if unmet:
        raise typer.Exit(1)


@app.command()
def methods(
    family: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only the methods that this option selects, such as criterion."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with what each option means.")] = False,
    plugin: Plugins = None,
) -> None:
    """List all methods of pruning and training: what each does, its options with their defaults, and its paper.

    A method is selected by the option of its family, as in `--criterion snip_momentum`, and its own options are given
    by `--criterion_kwargs`. Those of plug-ins are listed too.
    """
    from .catalogue import read_catalogue
    from .methods import print_catalogue

    _load_plugins(plugin)
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
        typer.Option(help="Repository that the model will be uploaded to. Edits made to the card there are kept."),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="Output of `bench --json` in which this folder was measured: the card shows the times."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Rewrite the model card of a pruned model from the files beside its weights.

    The zeros are counted in the weights. Only the text between the two marks of hf_sparse is replaced, and only
    metadata that nobody has edited.
    """
    from ..hub.card import rewrite_card

    _load_plugins(plugin)
    typer.echo(rewrite_card(directory, repo, benchmark=benchmark))


@app.command()
def push(
    directory: Annotated[str, typer.Argument(help="Folder of a trainer, of one of its checkpoints, or of any model.")],
    repo: Annotated[str, typer.Argument(help='"user/name", or "name" under your own. Created if it does not exist.')],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    path_in_repo: Annotated[
        str | None, typer.Option(help="Folder in the repository. Left out: its top level.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    token_from_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable that holds the token. Left out: HF_TOKEN, or the token of `hf auth login`.",
        ),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Upload a folder to the Hub and print the address. Checkpoints in subfolders are left out: push each by itself.

    The card of a pruned model is rewritten before, as by `hf-sparse card --repo`, if `repo` is "user/name". Retries if
    the Hub is busy or out of reach. Exit codes: 0 uploaded, 1 the upload failed, 2 there is no such folder.
    """
    from ..hub.card import has_card_files, rewrite_card
    from ..hub.upload import UploadError
    from ..hub.upload import push as upload

    token = os.environ.get(token_from_env) if token_from_env else None
    if token_from_env is not None and not token:
        raise ValueError(
            "--token-from-env takes the name of an environment variable, never the token itself: there is no variable "
            "of this name, or it is empty."
        )
    _load_plugins(plugin)
    if has_card_files(directory) and "/" in repo and not path_in_repo:
        rewrite_card(directory, repo, token)
    try:
        options = {"revision": revision, "path_in_repo": path_in_repo, "message": message, "token": token}
        commit = upload(directory, repo, private=private or None, **options)
    except UploadError as error:
        typer.echo(f"hf-sparse: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(commit.repo_url)


app.command()(shrink)
app.command()(export)
app.command(cls=NumberListCommand)(bench)


# The options come from dataclasses that need torch, so they are read when the command runs.
@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def prune(context: typer.Context) -> None:
    """Prune a pretrained model without training, from calibration data."""
    from ..oneshot import OneshotArguments, OneshotConfig, run_oneshot
    from .dataclass_options import dataclass_command, with_dashes

    def run(plugins: PluginArguments, arguments: OneshotArguments, config: OneshotConfig) -> None:
        """Prune a pretrained model without training, from calibration data, block by block.

        The method is Wanda, unless --criterion or --solver names another, such as SparseGPT with --solver sparsegpt.
        A run that was killed resumes after the last finished block when it is started again with the same options.
        Exit codes: 0 success, 2 the options, the data or the model do not allow it.
        """
        run_oneshot(arguments, config, echo=typer.echo)

    # Plug-ins come first: the other options may name what they register.
    classes = (PluginArguments, OneshotArguments, OneshotConfig)
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command(context_settings={"token_normalize_func": with_dashes})(
        dataclass_command(classes, run, ("model_name_or_path", "output_dir"))
    )
    code = typer.main.get_command(command).main(
        context.args, prog_name=context.command_path, standalone_mode=False, windows_expand_args=False
    )
    raise typer.Exit(code or 0)


def main() -> None:
    """Runs the program `hf-sparse`."""
    app(prog_name="hf-sparse")
