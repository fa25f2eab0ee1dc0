"""Options of verbs: headed groups in --help, counts as people write them, options that override a recipe's key."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter

from dic_repa.limits import check_limit
from dic_repa.recipe import Recipe
from dic_repa.recipe.keys import find_field
from dic_repa.recipe.values import whole_number

OTHERS = "Options"
PATH = click.Path(path_type=Path)


class Command(click.Command):
    """A verb whose --help lists its options under the headings of `option_group`."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(context):
            if isinstance(option, click.Option) and (record := option.get_help_record(context)):
                groups.setdefault(getattr(option, "group", OTHERS), []).append(record)
        for title, records in sorted(groups.items(), key=lambda entry: entry[0] == OTHERS):
            with formatter.section(title):
                formatter.write_dl(records)


def option_group(title: str, *options: Callable) -> Callable:
    """A decorator of a verb that adds the `options`, as `click.option` makes them, under one heading."""

    def decorate(function: Any) -> Any:
        before = len(getattr(function, "__click_params__", []))
        for option in reversed(options):
            function = option(function)
        for parameter in function.__click_params__[before:]:
            parameter.group = title
        return function

    return decorate


def set_option(whose: str = "the recipe") -> Callable:
    """The option --set, repeatable: `overrides` of keys."""
    text = f"Override a key of {whose}; repeatable."
    return click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help=text)


def json_option(more: str = "") -> Callable:
    """The option --json, as `as_json`; `more` is added to its help."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print JSON{more}.")


class Count(click.ParamType):
    """A whole number of at least `least`, also as 5e4 or 50_000, and not over the limit of that name."""

    name = "count"

    def __init__(self, least: int = 1, limit: str = "number"):
        self.least, self.limit = least, limit

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        number = whole_number(value)
        if not isinstance(number, int) or number < self.least:
            self.fail(f"takes whole numbers from {self.least}, not '{value}'", parameter, context)
        check_limit(self.limit, number, parameter.opts[0] if parameter else "a number")
        return number


class Between(click.FloatRange):
    """click's range of numbers, which takes `nan` for one inside it."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        number = super().convert(value, parameter, context)
        if math.isnan(number):
            self.fail(f"takes a number, not '{value}'", parameter, context)
        return number


class Several(click.ParamType):
    """A list of values of the type `one`, with commas between them."""

    name = "list"

    def __init__(self, one: Any):
        self.one = click.types.convert_type(one)

    def get_metavar(self, *arguments: Any, **given: Any) -> str:  # which ones depends on click's release
        return f"{self.one.get_metavar(*arguments, **given) or self.one.name.upper()},..."

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> list:
        return [self.one(part.strip(), parameter, context) for part in value.split(",")]


def recipe_option(key: str, form: str = "{}", **settings: Any) -> Callable:
    """An option that overrides a dotted `key` of a recipe, named as its last part.

    Text, type and default come from the schema; `form` may add words around the text.
    """
    field = find_field(Recipe, key)
    words, _, null = (field.description or "").partition("; null: ")
    default = null if field.default is None else field.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    name = "--" + key.rpartition(".")[2].replace("_", "-")
    kind = _click_type(TypeAdapter(field.rebuild_annotation()).json_schema())
    if kind is bool:
        name += f"/--no-{name[2:]}"
    text = form.format(words)
    help_text = f"{text[0].upper()}{text[1:]}.  [recipe, else {default}]"
    return click.option(name, default=None, type=kind, help=help_text, **settings)


def _click_type(schema: dict[str, Any]) -> Any:
    """The click type of a JSON schema; null stands for an option that is not given."""
    schema = next(one for one in schema.get("anyOf", [schema]) if one.get("type") != "null")
    if "enum" in schema:
        return click.Choice(schema["enum"])
    if schema.get("type") == "array":
        return tuple(map(_click_type, schema["prefixItems"]))
    if schema.get("type") == "integer":
        return Count(schema.get("minimum", 0))
    return {"number": float, "boolean": bool}.get(schema.get("type", ""), str)


# Of what is measured.
DEVICE = click.option("--device", help="cpu, cuda or cuda:1.  [default: the GPU where there is one]")
ROUNDS = click.option("--rounds", type=Count(1, "repeats"), default=7, help="How often each case is measured.")
