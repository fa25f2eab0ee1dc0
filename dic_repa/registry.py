"""A name-to-factory table: what timm does for models, for encoders, heads, solvers, data sets and metrics.

heads = Registry("head")

@heads.register("linear")
class LinearHead(nn.Module): ...

heads.get("linaer")  # UserError: unknown head 'linaer'; did you mean linear?
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

from dic_repa.errors import UserError, unknown_name


class Registry:
    """Named factories of one `kind` (the word that error messages use)."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that files its class or function under `name`. Filing a second thing there is a UserError."""

        def decorate(entry):
            known = self._entries.get(name)
            if known is not None and not _same(known, entry):
                raise UserError(f"{self.kind} '{name}' is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> Any:
        """The entry filed under `name`; a UserError that lists the near names where there is none."""
        try:
            return self._entries[name]
        except KeyError:
            raise unknown_name(self.kind, name, self._entries) from None

    def names(self, pattern: str = "*") -> list[str]:
        """The sorted names that match a shell `pattern`."""
        return sorted(fnmatch.filter(self._entries, pattern))

    def __contains__(self, name: str) -> bool:
        return name in self._entries


def _same(known: Any, entry: Any) -> bool:
    """Whether both are one thing: a module that is reloaded, or run as __main__ and imported, files it again."""
    places = [(getattr(e, "__module__", ""), getattr(e, "__qualname__", repr(e))) for e in (known, entry)]
    same_module = places[0][0] == places[1][0] or "__main__" in (places[0][0], places[1][0])
    return same_module and places[0][1] == places[1][1]
