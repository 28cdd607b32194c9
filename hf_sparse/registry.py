"""Registries: name -> class or function, one registry per family of methods."""

from __future__ import annotations

import difflib
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
            TypeError: the member is not a complete subclass of the family's base class.
            ValueError: `name` is taken by another member, or `check` refuses the member.
        """

        def add(member: Any) -> Any:
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

    def check(self, name: str, member: Any) -> None:
        """Called before a member is registered. Subclasses raise an error when it does not belong here."""

    def __getitem__(self, name: str) -> Any:
        if name not in self._members:
            raise ValueError(f"unknown {self.family} {self.describe(name)}")
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def names(self) -> list[str]:
        """Returns the registered names, sorted."""
        return sorted(self._members)

    def describe(self, name: object) -> str:
        """Returns text for an error about an unknown `name`: the name, the known names, the nearest."""
        return f'"{name}": known are {", ".join(self.names())}.{nearest(str(name), self.names())}'
