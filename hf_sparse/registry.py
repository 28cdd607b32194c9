"""Registries: name -> class or function, one registry per family of methods."""

from __future__ import annotations

import difflib
import inspect
import reprlib
from collections.abc import Callable, Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint at the known name closest to `name`, or "" when none is close.

    Example:
        >>> nearest("magnitud", ["magnitude", "snip"])
        ' Did you mean "magnitude"?'
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 120, 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 8

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write numbers of more than 4,300 digits.
        return repr(x) if abs(x) < 10**40 else f"a whole number of about {int(x.bit_length() * 0.30103) + 1:,} digits"


_SHORT = _ShortRepr()


def format_value(value: object) -> str:
    """Returns a value as Python writes it, shortened where it is long, for an error message.

    Example:
        >>> format_value([0.5, "a" * 9]), format_value(10**400), len(format_value("a" * 10**6))
        ("[0.5, 'aaaaaaaaa']", 'a whole number of about 401 digits', 120)
    """
    return _SHORT.repr(value)


def format_name(name: object) -> str:
    """Returns a name in quotes, shortened where it is long, for an error message."""
    text = name if isinstance(name, str) else format_value(name)
    return f'"{text}"' if len(text) <= _SHORT.maxstring else f'"{text[: _SHORT.maxstring]}..."'


def format_options(names: Iterable[str]) -> str:
    """Returns the names of options for an error message, as in "`scope`, `swaps`"."""
    return ", ".join(f"`{name}`" for name in names)


def _check_signature(owner: str, declared: Callable[..., Any], own: Callable[..., Any]) -> None:
    """Raises a TypeError if a method cannot be called with the positional arguments that its base class declares."""
    parameters = list(inspect.signature(declared).parameters)
    try:
        inspect.signature(own).bind(*parameters)
    except TypeError as error:
        call = f"{declared.__name__}({', '.join(parameters[1:])})"
        raise TypeError(f"{owner}: {declared.__name__} is called as {call}, which it cannot be ({error}).") from error


class Registry:
    """The members of one family by name.

    Args:
        family: the word for a member in error messages, such as "scheduler".
        base: the class that all members inherit from; None if members are functions.

    Example:
        >>> colours = Registry("colour")
        >>> @colours.register("red")
        ... class Red: ...
        >>> colours["red"] is Red
        True
        >>> colours["rad"]
        Traceback (most recent call last):
        ...
        ValueError: unknown colour "rad": known are red. Did you mean "red"?
    """

    def __init__(self, family: str, base: type | None = None):
        self.family, self.base = family, base
        self._members: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Returns a decorator that registers a class or function under `name`.

        Raises:
            TypeError: the name is no text, or the member is not a complete subclass of the family's base class.
            ValueError: `name` is taken by another member, or `check` refuses the member.
        """

        def add(member: Any) -> Any:
            if not (isinstance(name, str) and name):
                raise TypeError(f"the name of a {self.family} must be text, but is {format_value(name)}.")
            taken = self._members.get(name)
            if taken is member:
                return member
            self._check_base(name, member)
            origin = member.__module__, member.__qualname__
            # A cell of a notebook that runs again, or a module that is reloaded, defines the same member anew.
            if taken is not None and (taken.__module__, taken.__qualname__) != origin:
                raise ValueError(
                    f'{self.family} "{name}" is already registered, by {taken.__module__}.{taken.__qualname__}: '
                    "choose another name."
                )
            self.check(name, member)
            self._members[name] = member
            return member

        return add

    def _check_base(self, name: str, member: Any) -> None:
        if self.base is None:
            return
        if not (isinstance(member, type) and issubclass(member, self.base)):
            raise TypeError(f'{self.family} "{name}" must be a subclass of {self.base.__name__}, but is {member!r}.')
        if abstract := sorted(getattr(member, "__abstractmethods__", ())):
            raise TypeError(f'{self.family} "{name}" must define {", ".join(abstract)}.')
        for method in sorted(getattr(self.base, "__abstractmethods__", ())):
            declared, own = getattr(self.base, method), getattr(member, method)
            if inspect.isfunction(declared) and inspect.isfunction(own):
                _check_signature(f'{self.family} "{name}"', declared, own)

    def check(self, name: str, member: Any) -> None:
        """Called before a member is registered. Subclasses raise an error when it does not belong here."""

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise ValueError(f"unknown {self.family} {self.describe(name)}")
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._members

    def names(self) -> list[str]:
        """Returns the registered names, sorted."""
        return sorted(self._members)

    def describe(self, name: object) -> str:
        """Returns text for an error about an unknown `name`: the name, the known names, the nearest."""
        return f"{format_name(name)}: known are {', '.join(self.names())}.{nearest(str(name), self.names())}"
