"""`dic-repa bench data`."""

from __future__ import annotations

import json

import click

from dic_repa.cli import completion
from dic_repa.cli.options import Count
from dic_repa.recipe import load_training_recipe


@click.command("data")
@click.argument("recipe", shell_complete=completion.recipes)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
)
@click.option("--samples", type=Count(1), default=2000, help="How many to read.")
@click.option("--steps", type=Count(2), default=20, help="Training steps to time.")
@click.option("--encoded", type=Count(1), default=64, help="How many to encode.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(recipe: str, overrides: tuple[str, ...], samples: int, encoded: int, steps: int, as_json: bool):
    """Images per second of RECIPE's data, and the share of a training step that is spent waiting for them.

    The samples are written as loose files, as in REPA's layout, and read one at a time; that is what the loader and
    `dic-repa prepare` (on the same images, without and with the recipe's autoencoder) are compared with. Then the
    recipe is trained for some steps; a waiting share above a few percent calls for more data.workers.

    \b
    Examples:
      dic-repa bench data mine.yaml
      dic-repa bench data mine.yaml --set data.workers=8 --json
    """
    from dic_repa.bench.data import bench_data

    result = bench_data(load_training_recipe(recipe, overrides), samples, encoded, steps)
    click.echo(json.dumps(result, indent=2) if as_json else _table(result))


def _table(result: dict) -> str:
    width = max(map(len, result["images_per_second"]))
    lines = [
        f"{name:{width}} {speed:10.0f} images/s   {result['to_loose_files'][name]:6.2f} of loose files one by one"
        for name, speed in result["images_per_second"].items()
    ]
    lines.append(f"{'training':{width}} {result['training_images_per_second']:10.0f} images/s")
    return "\n".join([*lines, f"waiting for data {result['waiting_share']:.1%} of a step, {result['workers']} workers"])
