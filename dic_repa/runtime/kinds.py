"""Whether options are of the kinds that a function's annotations name: numbers, switches, texts.

Python does not ask, so `flip: "no"` would flip, and `hidden: true` would be one channel.
"""

import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any

_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_WORDS |= {NoneType: "null", list[int]: "a list of whole numbers"}


def wrong_kind(function: Callable[..., Any], options: Mapping[str, Any]) -> str | None:
    """What is wrong with the first of the options that is of another kind than annotated, such as "flip takes true or
    false, not 'no'"; None if nothing is, or the annotation says more than these kinds."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports
        return None
    for name, value in options.items():
        hint = hints.get(name)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
        if all(kind in _WORDS for kind in kinds) and not any(_is_one(value, kind) for kind in kinds):
            return f"{name} takes {' or '.join(_WORDS[kind] for kind in kinds)}, not {value!r}"
    return None


def _is_one(value: Any, kind: Any) -> bool:
    if kind == list[int]:
        return isinstance(value, list | tuple) and all(_is_one(each, int) for each in value)
    if kind in (int, float):  # numpy's too
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)
