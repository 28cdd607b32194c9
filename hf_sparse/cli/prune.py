"""The command `prune`, whose options are the fields of dataclasses that import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from typer.core import TyperCommand

from .dataclass_options import dataclass_command, with_dashes
from .plugins import PluginArguments


if TYPE_CHECKING:
    from ..oneshot import OneshotArguments, OneshotConfig


def prune() -> None:
    """Prune a pretrained model without training, from calibration data."""
    # Stands for the command in the list of commands; `load_prune_command` returns the one that runs.


def load_prune_command() -> TyperCommand:
    """Returns the command with its options."""
    from ..oneshot import OneshotArguments, OneshotConfig, run_oneshot

    def run(plugins: PluginArguments, arguments: OneshotArguments, config: OneshotConfig) -> None:
        """Prune a pretrained model without training, from calibration data, block by block.

        The method is Wanda, unless --criterion or --solver names another, such as SparseGPT with --solver sparsegpt.
        A run that was killed resumes after the last finished block when it is started again with the same options.
        Exit codes: 0 success, 2 invalid options, data or model.
        """
        run_oneshot(arguments, config, echo=typer.echo)

    # Plug-ins come first: the other options may name what they register.
    classes = (PluginArguments, OneshotArguments, OneshotConfig)
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command("prune", context_settings={"token_normalize_func": with_dashes})(
        dataclass_command(classes, run, ("model_name_or_path", "output_dir"))
    )
    command = typer.main.get_command(program)
    if not isinstance(command, TyperCommand):
        raise TypeError(f"{command} is not a single command.")
    return command
