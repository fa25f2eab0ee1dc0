"""Names of a package that are imported on first use, so that importing the package itself stays quick."""

from importlib import import_module
from typing import Any


def load_name(package: str, homes: dict[str, str], name: str) -> Any:
    """`name` from the module of `package` that `homes` gives for it: the body of a package's `__getattr__`."""
    if name not in homes:
        raise AttributeError(f"module '{package}' has no attribute '{name}'")
    return getattr(import_module(f"{package}.{homes[name]}"), name)
