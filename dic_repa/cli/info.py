"""`dic-repa info`."""

from __future__ import annotations

import json

import click

from dic_repa.errors import UserError
from dic_repa.recipe import load_training_recipe


@click.command("info")
@click.argument("names", nargs=-1)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(4),
    multiple=True,
    help="Height and width of the latent.  [default: 32 and 64]",
)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of a recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, unrounded.")
def command(names: tuple[str, ...], sizes: tuple[int, ...], overrides: tuple[str, ...], as_json: bool):
    """Parameters and multiply-accumulates (MACs; papers call them FLOPs) of presets or recipes; of all presets by
    default.

    A preset is counted with 4 input and 8 output channels and 1000 classes, a recipe with what it says. "Winograd" is
    what is left when the blocks' 3x3 convolutions take 2.25 times fewer multiplications.

    \b
    Examples:
      dic-repa info
      dic-repa info DiC-XL --size 32
      dic-repa info digits-urepa
    """
    import torch

    from dic_repa.build import build_dataset, build_denoiser, import_plugins
    from dic_repa.models import PRESETS, DiC, measure_cost

    rows = []
    for name in names or PRESETS:
        with torch.device("meta"):
            if name in PRESETS:
                model, default = DiC.from_preset(name, learn_sigma=True), (32, 64)
            else:
                try:
                    recipe = load_training_recipe(name, overrides)
                except UserError as error:
                    raise UserError(f"{error} (presets: {', '.join(PRESETS)})") from None
                import_plugins(recipe)
                data = build_dataset(recipe.data)
                model, default = build_denoiser(recipe.model, data.channels, data.num_classes), (recipe.data.size,)
        for size in sizes or default:
            rows.append({"model": name, "size": size, **vars(measure_cost(model, size))})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["model"]) for row in rows)
    click.echo(f"{'model':{width}}  latent   params (M)     GMACs  with Winograd")
    for row in rows:
        latent = f"{row['size']}x{row['size']}"
        click.echo(
            f"{row['model']:{width}}  {latent:>6}  {_in(row['parameters'], 1e6):>10}  "
            f"{_in(row['macs'], 1e9):>8}  {_in(row['winograd_macs'], 1e9, 1):>13}"
        )


def _in(count: int, unit: float, digits: int = 2) -> str:
    """`count` in millions or billions, with more digits where the number is small."""
    value = count / unit
    return f"{value:.{digits}f}" if value >= 1 else f"{value:.3g}"
