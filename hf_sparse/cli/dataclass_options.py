"""Commands whose options are the fields of dataclasses, as `HfArgumentParser` makes them for scripts."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..registry import format_value


def dataclass_command(
    classes: Sequence[type], run: Callable[..., None], arguments: Sequence[str] = ()
) -> Callable[..., None]:
    """Returns a function that typer turns into a command, whose options are the fields of dataclasses.

    A field's metadata has its `help`, and may have a `metavar`. Fields that hold a dict are given as JSON. Where None
    means that an option was not given, the class attribute `defaults` has the default.

    Args:
        classes: the dataclasses. The options of each are a panel of the help, under the first line of its docstring.
        run: is called with an instance of each class. Its docstring is the help of the command.
        arguments: names of the fields that are positional arguments.
    """

    def command(**values: Any) -> None:
        run(*(cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)}) for cls in classes))

    parameters = []
    for cls in classes:
        hints, defaults = typing.get_type_hints(cls), getattr(cls, "defaults", {})
        panel = (inspect.getdoc(cls) or cls.__name__).splitlines()[0]
        for field in dataclasses.fields(cls):
            default = defaults.get(field.name, field.default)
            parameters.append(_parameter(field, hints[field.name], default, field.name in arguments, panel))
    parameters.sort(key=lambda parameter: parameter.name not in arguments)
    # typer reads the options from the signature and the annotations.
    vars(command).update(__signature__=inspect.Signature(parameters))
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = run.__doc__
    return command


def _parameter(field: dataclasses.Field, hint: Any, default: Any, is_argument: bool, panel: str) -> inspect.Parameter:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    kind = str if str in kinds else kinds[0]
    settings: dict[str, Any] = {"help": field.metadata["help"], "metavar": field.metadata.get("metavar")}
    if any(dict in (kind, typing.get_origin(kind)) for kind in kinds):
        settings["metavar"] = "JSON"
        if kind is not str:
            kind, settings["parser"] = str, _parse_json
    if is_argument:
        info = typer.Argument(**settings)
    else:
        flags = f"--{with_dashes(field.name)}"
        if kind is bool and (default or field.default is None):  # None: not given, which is not false
            flags += f"/--no-{with_dashes(field.name)}"
        info = typer.Option(flags, rich_help_panel=panel, **settings)
    annotation = Annotated[kind | None, info]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def with_dashes(name: str) -> str:
    """Returns an option's name with dashes for underscores; the command accepts either."""
    return name.replace("_", "-")


def _parse_json(text: str) -> dict[str, Any]:
    from ..files import parse_json  # imports torch

    try:
        value = parse_json(text)
    except ValueError as error:
        raise typer.BadParameter(f"{format_value(text)} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{format_value(text)} is not a JSON object, as in '{{\"name\": 0.5}}'.")
    return value
