"""`dic-repa recipes`."""

from __future__ import annotations

import click

from dic_repa.recipe import list_recipes, load_recipe, to_yaml


@click.group("recipes", invoke_without_command=True)
@click.pass_context
def command(context: click.Context):
    """List the recipes that come with the package, a line each.

    \b
    Examples:
      dic-repa recipes
      dic-repa recipes show digits-urepa > mine.yaml      a starting point; a path works wherever a name does
    """
    if context.invoked_subcommand is None:
        recipes = list_recipes()
        width = max(map(len, recipes))
        for name, description in recipes.items():
            click.echo(f"{name:{width}}  {description}")


@command.command("show")
@click.argument("recipe")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key; repeatable.")
def show(recipe: str, overrides: tuple[str, ...]):
    """Print RECIPE (a name or a YAML file) resolved, all defaults included."""
    click.echo(to_yaml(load_recipe(recipe, overrides)), nl=False)
