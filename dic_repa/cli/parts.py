"""`dic-repa parts`."""

from importlib import import_module

import click

from dic_repa.cli import completion
from dic_repa.errors import UserError, unknown_name
from dic_repa.registry import Registry, import_plugin
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.table import format_rows

# The modules in which the registries are, in the order of the list.
_HOMES = (
    "models.registry models.blocks data data.autoencoders objectives.base interpolants objectives.flow_matching "
    "encoders.base alignment.self_teachers alignment.heads alignment.losses alignment.schedules "
    "training.optimizers training.schedules training.trackers samplers.solvers samplers.guidance samplers.grids "
    "samplers.sde evaluation.metrics evaluation.extractors"
).split()
_FURTHER = {
    "encoder": "dic-repa encoders",
    "autoencoder": "dic-repa autoencoders",
    "denoiser": "dic-repa info",
    "ODE solver": "dic-repa solvers",
}


@click.command("parts")
@click.argument("kind", required=False, shell_complete=completion.parts)
@click.option("--plugin", "plugins", metavar="MODULE", multiple=True, help="Import a module that registers parts.")
def command(kind: str | None, plugins: tuple[str, ...]):
    """List the kinds of part that a recipe can choose, or the parts of one KIND.

    Parts of your own are listed too: those of --plugin, and those that an installed package offers as entry points.
    What a part of each kind must have is said in dic_repa/protocols.py.

    \b
    Examples:
      dic-repa parts
      dic-repa parts time-weight
      dic-repa parts ode-solver --plugin my_solver
    """
    for plugin in plugins:
        import_plugin(plugin)
    kinds = find_registries()
    if kind is None:
        _print(["kind", "parts", "in a recipe"], *([slug, len(r.names()), r.key] for slug, r in kinds.items()))
        return
    slug = kind.replace(" ", "-").lower()
    registry = kinds.get(slug) or kinds.get(slug.removesuffix("s"))
    if registry is None:
        raise unknown_name("kind of part", kind, kinds)
    columns = ["order", "evaluations"] if registry.kind.endswith("solver") else []
    _print([registry.kind, *columns, "description"], *(_row(registry, name, len(columns)) for name in registry))
    where = f"in a recipe: {registry.key}; " if registry.key else ""
    print_result(f"\n{where}entry points: {registry.group}; what one must have: dic_repa.protocols.{registry.protocol}")
    if registry.kind in _FURTHER:
        print_result(f"more about them: {_FURTHER[registry.kind]}")


def find_registries() -> dict[str, Registry]:
    """Every kind's registry, by its name with hyphens."""
    found: dict[str, Registry] = {}
    for home in _HOMES:
        for value in vars(import_module(f"dic_repa.{home}")).values():
            if isinstance(value, Registry):
                found.setdefault(value.slug, value)
    return found


def _row(registry: Registry, name: str, facts: int) -> list:
    try:
        found = [registry.fact(name, "order", 1), registry.fact(name, "evaluations", 1) or "auto"]
        return [name, *found[:facts], registry.describe(name)]
    except UserError as error:  # a broken package hides no other part
        return [name, *["-"] * facts, str(error)]


def _print(*rows: list) -> None:
    print_result(format_rows([[str(cell) for cell in row] for row in rows], left=(0, len(rows[0]) - 1)))
