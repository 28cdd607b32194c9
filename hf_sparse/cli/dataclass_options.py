"""Dataclasses as the options of a command: names, defaults and helps come from their fields, where they are written
once; `HfArgumentParser` reads the same fields for scripts."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer


def dataclass_command(
    classes: Sequence[type], run: Callable[..., None], arguments: Sequence[str] = ()
) -> Callable[..., None]:
    """A function that typer takes for a command: it makes the dataclasses of what is given, and calls `run` on them.

    Args:
        classes: whose fields are the options, each in a panel of its own.
        run: gets an instance of each; its docstring is the command's help.
        arguments: fields that are given by position.
    """

    def command(**values: Any) -> None:
        run(*(cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)}) for cls in classes))

    parameters = [
        _parameter(field, hint, field.name in arguments, inspect.getdoc(cls).splitlines()[0])
        for cls in classes
        for hints in [typing.get_type_hints(cls)]
        for field in dataclasses.fields(cls)
        for hint in [hints[field.name]]
    ]
    parameters.sort(key=lambda parameter: parameter.name not in arguments)
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = run.__doc__
    return command


def _parameter(field: dataclasses.Field, hint: Any, by_position: bool, panel: str) -> inspect.Parameter:
    kind, text = _kind(hint), field.metadata["help"]
    if by_position:
        told = typer.Argument(help=text)
    else:
        told = typer.Option(_names(field.name, kind, field.default), help=text, rich_help_panel=panel)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind | None, told]
    )


def _names(name: str, kind: Any, default: Any) -> str:
    """As typer takes it; `as_dashed` reads underscores for dashes.

    Example:
        >>> _names("keep_zeros", bool, False), _names("sequential", bool, True)
        ('--keep-zeros', '--sequential/--no-sequential')
    """
    name = as_dashed(name)
    return f"--{name}/--no-{name}" if kind is bool and default else f"--{name}"


def as_dashed(name: str) -> str:
    """The scripts' options have underscores. Both will do."""
    return name.replace("_", "-")


def _kind(hint: Any) -> Any:
    """What the text on the command line is read as: the type without None, text for what is a mapping."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    return str if str in kinds else kinds[0]
