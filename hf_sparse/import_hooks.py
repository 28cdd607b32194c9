"""Calls a function once another package is imported, without importing it; hides a package from what would import
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
    """Finds one module by the other finders, and calls a function after it was executed."""

    def __init__(self, module: str, function: str):
        self._module, self._function = module, function

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
                _call(self._function)

            loader.exec_module = exec_module
        return spec


def call_after_import(module: str, function: str) -> None:
    """Calls a function as soon as a module is imported: now, if it is already.

    Args:
        module: full name, such as "transformers.quantizers.auto".
        function: the name of a function without arguments and of its module, which is imported only then, as in
            "package.module:function".

    Example:
        >>> call_after_import("sys", "gc:collect")
    """
    if module in sys.modules:
        _call(function)
    else:
        sys.meta_path.insert(0, _ImportHook(module, function))


def _call(function: str) -> None:
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)()


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
