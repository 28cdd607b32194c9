"""Optional packages: what an extra installs, and the error where it is missing."""

from __future__ import annotations

import importlib.util


def has_packages(*packages: str) -> bool:
    """Returns whether all packages are installed, without importing them.

    Example:
        >>> has_packages("torch"), has_packages("torch", "no_such_package")
        (True, False)
    """
    return all(importlib.util.find_spec(package) for package in packages)


def require(extra: str, *packages: str) -> None:
    """Raises an error if a package is missing.

    Args:
        extra: the extra of hf_sparse that installs the packages.
        packages: names as in an import statement.

    Raises:
        ImportError: with the packages that are missing, and the command that installs them.

    Example:
        >>> require("export", "torch", "no_such_package")
        Traceback (most recent call last):
        ...
        ImportError: no_such_package is not installed: pip install "hf_sparse[export]"
    """
    if missing := [package for package in packages if not has_packages(package)]:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f'{", ".join(missing)} {verb} not installed: pip install "hf_sparse[{extra}]"')
