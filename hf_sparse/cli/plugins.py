"""The option `--plugin`, which loads methods of the user before a command looks them up."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import typer


_HELP = (
    "Python file or module that registers your own criteria, patterns or other methods; repeat the option for "
    "several. It runs with your permissions."
)
Plugins = Annotated[list[str] | None, typer.Option(metavar="FILE_OR_MODULE", help=_HELP)]


@dataclass
class PluginArguments:
    """Plug-ins: methods of your own."""

    plugin: list[str] | None = field(default=None, metadata={"help": _HELP, "metavar": "FILE_OR_MODULE"})

    def __post_init__(self) -> None:
        load_plugins(self.plugin)


def load_plugins(plugins: Iterable[str] | None) -> None:
    """Loads each plug-in."""
    from ..plugins import load_plugin

    for plugin in plugins or ():
        load_plugin(plugin)
