"""Registries of methods that own their options: a name and a mapping of options become an instance, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from .registry import Registry, format_name, format_value, nearest
from .requires import Requires


class MethodRegistry(Registry):
    """The members of a family of methods. A member is a class; where it is a dataclass its fields are its options.

    Args:
        family: the word for a member in error messages, such as "criterion".
        base: the class that all members inherit from.
        requires: what members of the family can require, and the class that those with this requirement inherit from.

    Example:
        >>> class Method: ...
        >>> methods = MethodRegistry("method", Method)
        >>> @methods.register("decaying")
        ... @dataclasses.dataclass(frozen=True)
        ... class Decaying(Method):
        ...     decay: float = 0.9
        >>> methods.create("decaying", {"decay": 0.5})
        Decaying(decay=0.5)
        >>> methods.name_and_options(Decaying(0.5))
        ('decaying', {'decay': 0.5})
        >>> methods.create("decaying", {"decya": 0.5})
        Traceback (most recent call last):
        ...
        ValueError: method "decaying" has no option "decya": known are decay. Did you mean "decay"?
    """

    base: type

    def __init__(self, family: str, base: type, requires: Mapping[Requires, type] | None = None):
        super().__init__(family, base)
        self._requires = requires

    def check(self, name: str, member: Any) -> None:
        """Raises an error when the family does not provide what `member` requires."""
        if self._requires is None:
            return
        if hasattr(member, "needs"):
            raise TypeError(
                f'{self.family} "{name}" declares `needs`: declare `requires`, a flag of `Requires`, instead.'
            )
        requires = member.requires
        if requires not in self._requires:
            allowed = " or ".join(str(flag) for flag in self._requires)
            raise ValueError(f'{self.family} "{name}" requires {requires}, but it can require {allowed}.')
        if not issubclass(member, self._requires[requires]):
            needed = self._requires[requires].__name__
            raise TypeError(f'{self.family} "{name}" requires {requires}: it must be a subclass of {needed}.')

    def create(self, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """Returns the member `name` with its options; those left out have their defaults.

        Raises:
            ValueError: the name or an option is unknown, or a value is of the wrong type or out of range.
        """
        described = f'{self.family} "{name}"'
        return create_from_options(self[name], options or {}, described, f"{self.family}_kwargs")

    def name_and_options(self, method: Any) -> tuple[str, dict[str, Any]]:
        """Returns the name under which the class of `method` is registered, and its options that differ from their
        defaults.

        Raises:
            ValueError: the class is not registered.
        """
        name = next((name for name in self.names() if self[name] is type(method)), None)
        if name is None:
            raise ValueError(
                f"{self.family} {method!r} is not registered: decorate its class with register_{self.family}."
            )
        values = {field.name: (getattr(method, field.name), field.default) for field in _option_fields(type(method))}
        changed = {option: value for option, (value, default) in values.items() if value != default}
        # As they are read from JSON.
        return name, {option: list(value) if isinstance(value, tuple) else value for option, value in changed.items()}


def create_from_options(member: type, options: Mapping[str, Any], described: str, argument: str) -> Any:
    """Returns an instance of a class whose dataclass fields are its options; those left out have their defaults.

    Args:
        member: the class.
        options: JSON values, by name.
        described: the words for the class in error messages.
        argument: the name of the argument that holds the options.

    Raises:
        ValueError: an option is unknown, or a value is missing, of the wrong type or out of range.
    """
    fields = {field.name: field for field in _option_fields(member)}
    for option in options:
        if option not in fields:
            known = f"known are {', '.join(fields)}" if fields else "it has none"
            raise ValueError(f"{described} has no option {format_name(option)}: {known}.{nearest(option, fields)}")
    missing = [option for option, field in fields.items() if _is_required(field) and option not in options]
    if missing:
        raise ValueError(f"{described} has no default for {', '.join(missing)}: give `{argument}`.")
    hints = typing.get_type_hints(member) if fields else {}
    values = {option: _from_json(value, hints[option]) for option, value in options.items()}
    for option, value in values.items():
        if not _is_instance(value, hints[option]):
            raise ValueError(
                f'option "{option}" of {described} is {format_value(value)}: it must be {type_name(hints[option])}.'
            )
    try:
        return member(**values)
    except ValueError as error:
        # In quotes, because an option of the run may have the same name.
        message = str(error).replace("`", '"')
        raise ValueError(f"{described}: {message}") from error


def type_name(hint: Any) -> str:
    """Returns the words for a type in an error message.

    Example:
        >>> type_name(float), type_name(int | None)
        ('a number', 'a whole number or None')
    """
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "None"}
    return " or ".join(names.get(kind, getattr(kind, "__name__", str(kind))) for kind in _members(hint))


def _option_fields(member: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(member) if field.init] if dataclasses.is_dataclass(member) else []


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _from_json(value: Any, hint: Any) -> Any:
    """Returns a list as the tuple that the option holds."""
    kinds = [typing.get_origin(kind) or kind for kind in _members(hint)]
    return tuple(value) if isinstance(value, list) and tuple in kinds and list not in kinds else value


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | None)) else (hint,)


def _is_instance(value: Any, hint: Any) -> bool:
    for kind in _members(hint):
        kind = typing.get_origin(kind) or kind
        if kind is Any or not isinstance(kind, type):
            return True
        if isinstance(value, bool) and kind is not bool:
            continue
        if isinstance(value, kind) or (kind is float and isinstance(value, int)):
            return True
    return False
