"""`dic-repa recipes`."""

from __future__ import annotations

import json
from typing import Any

import click

from dic_repa.cli.groups import Group
from dic_repa.recipe import list_recipes, load_recipe, to_yaml

# By the first word of a recipe's name.
GROUPS = {
    "digits": "Digits: minutes on a laptop",
    "imagenet256": "ImageNet: the rows of the papers",
    "urepa": "ImageNet: U-REPA's ablations",
    "ladder": "ImageNet: the ladder from an isotropic network to DiC",
    "baseline": "ImageNet: other denoisers on the same loop",
    "sample": "Sampling from a finished run: dic-repa sample RUN --recipe NAME",
}
OTHERS = "imagenet256"
BASELINES = ("sit", "dit", "u")


@click.group("recipes", cls=Group, invoke_without_command=True)
@click.pass_context
def command(context: click.Context):
    """List the recipes that come with the package, a line each.

    \b
    Examples:
      dic-repa recipes
      dic-repa recipes show digits-urepa > mine.yaml      a starting point; a path works wherever a name does
      dic-repa recipes diff dic-xl dic-xl-urepa           what differs, key by key
    """
    if context.invoked_subcommand is not None:
        return
    recipes = list_recipes()
    width = max(map(len, recipes))
    grouped: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in recipes:
        word = name.partition("-")[0]
        group = "baseline" if word in BASELINES else word
        grouped[group if group in GROUPS else OTHERS].append(name)
    for group, names in grouped.items():
        click.echo(f"{GROUPS[group]}:")
        for name in names:
            click.echo(f"  {name:{width}}  {recipes[name]}")


@command.command("show")
@click.argument("recipe")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key; repeatable.")
def show(recipe: str, overrides: tuple[str, ...]):
    """Print RECIPE (a name or a YAML file) resolved, all defaults included.

    \b
    Examples:
      dic-repa recipes show dic-xl-urepa
      dic-repa recipes show dic-xl-urepa --set train.batch_size=128 > mine.yaml
    """
    click.echo(to_yaml(load_recipe(recipe, overrides)), nl=False)


@command.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the key, and the value in A and in B.")
def diff(a: str, b: str, as_json: bool):
    """Print the keys in which the recipes A and B differ, defaults filled in, with the value of each.

    `-` stands where a recipe has no such key. Descriptions and the papers' numbers are left out.

    \b
    Examples:
      dic-repa recipes diff dic-xl dic-xl-urepa
      dic-repa recipes diff runs/mine/recipe.yaml dic-xl-urepa     a finished run against a row of the paper
    """
    from dic_repa.recipe_diff import differences

    different = differences(load_recipe(a), load_recipe(b))
    if as_json:
        click.echo(json.dumps({key: list(pair) for key, pair in different.items()}, indent=2))
    else:
        click.echo(table(different, a, b) if different else f"{a} and {b} are the same")


def table(different: dict[str, tuple[Any, Any]], a: str, b: str) -> str:
    """Three columns: the key, its value in recipe `a`, its value in `b`."""
    rows = [("key", a, b), *((key, *map(_text, pair)) for key, pair in different.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{key:{widths[0]}}  {left:{widths[1]}}  {right}" for key, left, right in rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
