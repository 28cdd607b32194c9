"""Imports a module once another package is imported, without importing that; hides a package from what would import
it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _ImportHook(importlib.abc.MetaPathFinder):
    """Finds one module by the other finders, and imports another one after it was executed."""

    def __init__(self, module: str, follower: str):
        self._module, self._follower = module, follower

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(self._follower)

            loader.exec_module = exec_module
        return spec


def import_after(module: str, follower: str) -> None:
    """Imports a second module as soon as a first one is imported: now, if it is already.

    Args:
        module: full name of the first, such as "transformers.quantizers.auto".
        follower: full name of the second. It may import the first one itself, and be imported before it: then it is
            only partly executed when the first one has been, so that it must need nobody to call it.

    Example:
        >>> import_after("sys", "gc")
    """
    if module in sys.modules:
        importlib.import_module(follower)
    else:
        sys.meta_path.insert(0, _ImportHook(module, follower))


@contextmanager
def hidden_package(name: str) -> Iterator[None]:
    """Within, a package that was not imported before counts as not installed, for libraries that import whatever is
    installed.

    Example:
        >>> import importlib.util
        >>> with hidden_package("this"):
        ...     importlib.util.find_spec("this") is None
        True
        >>> importlib.util.find_spec("this").name
        'this'
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # as the import system defines it
    try:
        yield
    finally:
        sys.modules.pop(name, None)
