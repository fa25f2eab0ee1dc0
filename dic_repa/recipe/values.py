"""The values of a recipe, as people write them: 1e3 steps, a learning rate of 1e-4, and YAML that reads both.

YAML 1.1 takes 1e3, 1e-4 and 1.0e3 for strings: it wants a dot and a sign in the exponent. It also takes 1:30 for 90,
010 for 8 and 2001-01-01 for a date, which are text here.
"""

import contextlib
import re
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from dic_repa.errors import UserError
from dic_repa.limits import check_limit

_TAG = "tag:yaml.org,2002:"
_NUMBERS = {  # without quotes
    "int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$",
    "float": r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def whole_number(value: Any) -> Any:
    """1000 from 1000.0, '1e3' and '1_000'; anything else unchanged, for a schema to refuse."""
    number = value
    if isinstance(value, str):
        if re.match("[-+]?0[0-9_]", value):
            return value  # 010 is 8 to YAML, and 10 to most people
        with contextlib.suppress(ValueError):
            return int(value)
        number = real_number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


def real_number(value: Any) -> Any:
    """0.001 from '1e-3'; anything else unchanged, for a schema to refuse."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def at_most(limit: str) -> AfterValidator:
    """Refuses a number, or a list with more entries, over the limit of that name."""

    def check(value: Any) -> Any:
        check_limit(limit, len(value) if isinstance(value, list) else value, "it")
        return value

    return AfterValidator(check)


def _odd(depths: tuple[int, ...]) -> tuple[int, ...]:
    if len(depths) % 2 == 0:
        count = len(depths)
        raise ValueError(f"takes an odd number of stages, such as [6, 5, 6]: encoder, middle, decoder, not {count}")
    return depths


# Strict, because pydantic otherwise takes `true` for 1.
WHOLE, REAL = BeforeValidator(whole_number), BeforeValidator(real_number)
Natural = Annotated[int, Field(ge=0, strict=True), WHOLE, at_most("number")]
Count = Annotated[int, Field(ge=1, strict=True), WHOLE, at_most("number")]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True), WHOLE]
Images = Annotated[Count, at_most("images")]
Batch = Annotated[Count, at_most("batch")]
Blocks = Annotated[Count, at_most("blocks")]
Stages = Annotated[tuple[Blocks, ...], AfterValidator(_odd)]  # blocks of each
Size = Annotated[int, Field(ge=4, strict=True), WHOLE, at_most("size")]
NotNegative = Annotated[float, Field(ge=0, strict=True), REAL]
Flag = Annotated[bool, Field(strict=True)]
Real = Annotated[float, Field(strict=True), REAL]
Positive = Annotated[float, Field(gt=0, strict=True), REAL]
Probability = Annotated[float, Field(ge=0, le=1, strict=True), REAL]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True), REAL]
Time = Annotated[float, Field(ge=0, le=1, strict=True), REAL]
Name = Annotated[str, Field(min_length=1)]


def _named(part: Any) -> Any:
    if isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("name"), str)):
        return part
    raise ValueError(f"takes a name, or a mapping of name and arguments, not {part!r}")


# YAML 1.1 reads a bare `no` as false.
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)]
OFF = BeforeValidator(lambda value: "off" if value is False else value)  # likewise `off`
# A share of the steps may be written as a number.
WeakModel = Annotated[str, Field(min_length=1), BeforeValidator(lambda v: f"{v:g}" if type(v) is float else v)]
Part = Annotated[Any, AfterValidator(_named)]  # such as v-shape, or {name: stop, steps: 100000}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # which one is known late
    """Reads plain YAML, and numbers with an exponent; 1e3, without a dot, is a whole one."""


class _Dumper(yaml.SafeDumper):
    """Puts a string into quotes that the loader would take for a number."""


def _construct_int(_loader: _Loader, node: yaml.ScalarNode) -> int:
    number = int(node.value.replace("_", ""), 16 if "x" in node.value else 10)
    if abs(number) >= 2**63:
        raise ValueError("a whole number of more than 18 digits")
    return number


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    value = loader.construct_yaml_float(node)
    return value if "." in node.value else whole_number(value)


def _only_plain() -> None:
    """Leave the loader its constructors of plain values, and numbers as `_NUMBERS` has them."""
    kinds = {None, *(_TAG + kind for kind in ("null", "bool", "str", "seq", "map"))}
    _Loader.yaml_constructors = {tag: made for tag, made in _Loader.yaml_constructors.items() if tag in kinds}
    _Loader.add_constructor(f"{_TAG}int", _construct_int)
    _Loader.add_constructor(f"{_TAG}float", _construct_float)
    others = {f"{_TAG}{kind}" for kind in ("int", "float", "timestamp")}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag not in others]
        for first, known in _Loader.yaml_implicit_resolvers.items()
    }
    for kind, form in _NUMBERS.items():
        for known in (_Loader, _Dumper):
            known.add_implicit_resolver(_TAG + kind, re.compile(form), list("-+.0123456789"))


_only_plain()


def read_yaml(text: str, source: str) -> Any:
    """The content of YAML: plain values alone.

    Raises:
        UserError: it is not YAML, or is ambiguous, too large or too deep; the line begins with `source`.
    """
    check_limit("recipe-bytes", len(text), f"{source}: its length")
    try:
        values, depth = _measure(text)
        check_limit("nesting", depth, f"{source}: the depth of its nesting")
        check_limit("values", values, f"{source}: the number of its values, with what aliases stand for,")
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{source} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None
    except UserError:
        raise
    except (ValueError, LookupError) as error:  # a value of another kind than its tag, such as !!int x
        raise UserError(f"{source} has a value that cannot be read: {error}") from None


@dataclass
class _Open:
    """A list or mapping that has begun and not ended."""

    anchor: str | None
    values: int  # before it
    level: int
    deepest: int  # level inside it
    is_mapping: bool
    nodes: int = 0  # in it; in a mapping each second one is a key
    lines: dict[str, int] = field(default_factory=dict)  # of its keys


def _measure(text: str) -> tuple[int, int]:
    """How many values YAML will have, and how deep, from the parser's events, which take no memory.

    Also refuses what would be lost, or repeated for ever: a key that is given twice, of which the last would be taken,
    and an alias inside what it stands for.
    """
    values, anchors = 0, {}
    inside = [_Open(None, 0, 0, 0, False)]
    for event in yaml.parse(text, Loader=_Loader):
        into = inside[-1]
        if isinstance(event, yaml.CollectionEndEvent):
            inside.pop()
            anchors[into.anchor] = values - into.values, into.deepest - into.level + 1
            inside[-1].deepest = max(inside[-1].deepest, into.deepest)
        if not isinstance(event, yaml.NodeEvent):
            continue
        into.nodes += 1
        size, depth, mark = 1, 0, typing.cast(yaml.Mark, event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise _Refused(f"the alias *{event.anchor} stands for nothing, or for what it is in", mark)
            size, depth = anchors[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            _check_scalar(event.value, into, mark)
            anchors[event.anchor] = 1, 0
        else:
            depth, is_mapping = 1, isinstance(event, yaml.MappingStartEvent)
            inside.append(_Open(event.anchor, values, len(inside), len(inside), is_mapping))
        values += size
        into.deepest = max(into.deepest, into.level + depth)
    return values, inside[0].deepest


def _check_scalar(text: str, into: _Open, mark: yaml.Mark) -> None:
    if control := _CONTROL.search(text):
        raise _Refused(f"a text has the character {control[0]!a}", mark)
    if into.is_mapping and into.nodes % 2:
        if text in into.lines:
            raise _Refused(f"the key '{text}' is given in line {into.lines[text]} already; keep one", mark)
        into.lines[text] = mark.line + 1


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, problem: str, mark: yaml.Mark):
        super().__init__(problem=problem, problem_mark=mark)


def write_yaml(content: Any) -> str:
    """Plain content as YAML, in its own order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
