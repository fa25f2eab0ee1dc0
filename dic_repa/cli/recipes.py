"""`dic-repa recipes`."""

import json
from typing import Any

import click

from dic_repa.cli import completion
from dic_repa.cli.groups import Group
from dic_repa.cli.options import json_option, set_option
from dic_repa.recipe import Recipe, list_recipes, load_recipe, to_yaml
from dic_repa.recipe.keys import Key, commented_yaml, find_keys, list_keys
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.table import format_rows

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
      dic-repa recipes explain train.ema_decay            what a key means and takes; without a key, all of them
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
        print_result(f"{GROUPS[group]}:")
        for name in names:
            print_result(f"  {name:{width}}  {recipes[name]}")


@command.command("show")
@click.argument("recipe", shell_complete=completion.recipes)
@set_option()
@click.option("--comments", is_flag=True, help="Above each key, its meaning and default as a comment.")
def show(recipe: str, overrides: tuple[str, ...], comments: bool):
    """Print RECIPE (a name or a YAML file) resolved, all defaults included.

    \b
    Examples:
      dic-repa recipes show dic-xl-urepa
      dic-repa recipes show digits-urepa --comments > mine.yaml
      dic-repa recipes show dic-xl-urepa --set train.batch_size=128 > mine.yaml
    """
    loaded = load_recipe(recipe, overrides, only_read=True)
    print_result(commented_yaml(loaded) if comments else to_yaml(loaded), end="")


@command.command("explain")
@click.argument("key", required=False, shell_complete=completion.keys)
def explain(key: str | None):
    """Print the meaning, the values and the default of KEY, such as train.ema_decay, or of each key in a section.

    Without KEY, of all keys. N is the number of an entry in a list, from 0.

    \b
    Examples:
      dic-repa recipes explain train.ema_decay
      dic-repa recipes explain sample.guidance
      dic-repa recipes explain alignments.tap
    """
    keys = find_keys(Recipe, key) if key else list_keys(Recipe).values()
    print_result("\n".join(map(_explanation, keys)))


def _explanation(key: Key) -> str:
    default = f"; default: {key.default_text}" if key.default_text else ""
    return f"{key.name}\n    {key.description}\n    {key.takes}{default}"


@command.command("diff")
@click.argument("a", shell_complete=completion.recipes)
@click.argument("b", shell_complete=completion.recipes)
@json_option(": the key, and the value in A and in B")
def diff(a: str, b: str, as_json: bool):
    """Print the keys in which the recipes A and B differ, defaults included, with both values.

    `-`: the recipe has no such key. Descriptions and the papers' numbers are left out.

    \b
    Examples:
      dic-repa recipes diff dic-xl dic-xl-urepa
      dic-repa recipes diff runs/mine/recipe.yaml dic-xl-urepa     a finished run against a row of the paper
    """
    from dic_repa.recipe.keys import differences

    different = differences(load_recipe(a, only_read=True), load_recipe(b, only_read=True))
    if as_json:
        print_result(json.dumps({key: list(pair) for key, pair in different.items()}, indent=2))
    else:
        rows = [("key", a, b), *((key, *map(_text, pair)) for key, pair in different.items())]
        print_result(format_rows(rows, left=range(3)) if different else f"{a} and {b} are the same")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
