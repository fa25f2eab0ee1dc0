"""The one exception for mistakes that a user can mend.

The command line prints it as a single line and exits with code 2; a traceback is shown only under `--debug`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: the cause, then the mend."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'; did you mean X or Y?'` for near names, else `'; known: ...'` (all of them where they are few)."""
    known = sorted(known)
    folded = {option.lower(): option for option in known}
    near = [folded[option] for option in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    if not known:
        return ""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"; known: {shown}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` ones, which lists the near ones."""
    return UserError(f"unknown {kind} '{name}'{did_you_mean(name, known)}")
