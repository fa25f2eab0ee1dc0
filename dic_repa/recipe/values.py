"""The values of a recipe, as people write them: 1e3 steps, a learning rate of 1e-4, and YAML that reads both.

YAML 1.1 takes 1e3, 1e-4 and 1.0e3 for strings: it wants a dot and a sign in the exponent.
"""

import contextlib
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

_WITH_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_FLOAT = "tag:yaml.org,2002:float"


def whole_number(value: Any) -> Any:
    """1000 from 1000.0, '1e3' and '1_000'; anything else unchanged, for a schema to refuse."""
    number = value
    if isinstance(value, str):
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


# Strict, because pydantic otherwise takes `true` for 1.
WHOLE, REAL = BeforeValidator(whole_number), BeforeValidator(real_number)
Natural = Annotated[int, Field(ge=0, strict=True), WHOLE]
Count = Annotated[int, Field(ge=1, strict=True), WHOLE]
MOST_IMAGES = 10_000_000  # each has a label in memory and in samples.json
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES, strict=True), WHOLE]
NotNegative = Annotated[float, Field(ge=0, strict=True), REAL]
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
Part = Annotated[Any, AfterValidator(_named)]  # such as v-shape, or {name: stop, steps: 100000}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # which one is known late
    """Reads plain YAML, and numbers with an exponent; 1e3, without a dot, is a whole one."""


class _Dumper(yaml.SafeDumper):
    """Puts a string into quotes that the loader would take for a number."""


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    value = loader.construct_yaml_float(node)
    return value if "." in node.value else whole_number(value)


_Loader.add_constructor(_FLOAT, _construct_float)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _WITH_EXPONENT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The content of YAML; a `yaml.YAMLError` if it is not YAML or has more than plain values."""
    return yaml.load(text, Loader=_Loader)


def write_yaml(content: Any) -> str:
    """Plain content as YAML, in its own order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
