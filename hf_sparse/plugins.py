"""Plug-ins: files and modules in which users register methods of their own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from functools import cache
from pathlib import Path


ENTRY_POINTS = "hf_sparse.plugins"
"""The entry point group under which an installed package names its plug-in modules."""

_loaded: dict[str, None] = {}


def load_plugin(plugin: str) -> None:
    """Imports a plug-in, so that the methods that it registers can be selected by name.

    Loading the same plug-in again does nothing. A plug-in is Python code that runs with your permissions: load only
    code that you trust.

    Args:
        plugin: a file (`my_methods.py`), or the name of an importable module (`my_package.methods`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the module cannot be imported, or registers a method that is not valid.

    Example:
        >>> load_plugin("no_such_methods.py")
        Traceback (most recent call last):
        ...
        FileNotFoundError: plug-in no_such_methods.py: there is no such file.
    """
    path = Path(plugin)
    name = path.name if path.suffix == ".py" else plugin
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"plug-in {plugin}: there is no such file.")
        _load_file(path.resolve())
    else:
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            raise ValueError(
                f'plug-in "{plugin}" cannot be imported: {error}. Give a .py file, or the name of an installed module.'
            ) from error
        except (SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f'plug-in "{plugin}": {error}') from error
    _loaded[name] = None


def _load_file(path: Path) -> None:
    # Two files of one name are two modules.
    module_name = f"hf_sparse_plugin_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"plug-in {path} cannot be imported: it is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, (ImportError, SyntaxError, TypeError, ValueError)):
            raise ValueError(f"plug-in {path}: {error}") from error
        raise


@cache
def load_installed_plugins() -> None:
    """Imports the modules that installed packages name in the entry point group `hf_sparse.plugins`, so that the
    methods that they register can be selected by name. Called before the names of methods are looked up.

    Raises:
        ValueError: a plug-in cannot be imported; its package is named.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else entry.value
            raise ValueError(f'plug-in "{entry.value}" of the package {package} cannot be loaded: {error}') from error
        _loaded[entry.value] = None


def loaded_plugins() -> list[str]:
    """Returns the names of the plug-ins that were loaded, in order: file names, and names of modules."""
    return list(_loaded)
