"""Public names of a package that are imported on first use (PEP 562).

The package `lazy-loader` does this too. It is not used, because a missing optional package must
become an error that names the extra to install.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]], *, extra: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package.

    Args:
        package: Name of the package, its `__name__`.
        homes: Names of the package's modules, each with the public names that are defined there.
        extra: Extra of the distribution that brings the packages these modules need.

    Returns:
        A function that imports a public name, and one that lists all public names.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{package}.{modules[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("crl_sdk"):
                raise
            from crl_sdk.errors import MissingDependencyError

            raise MissingDependencyError(error.name, extra, f"{package}.{name}") from error
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        names: list[str] = sys.modules[package].__all__
        return names

    return get, list_names
