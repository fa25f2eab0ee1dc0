"""`dic-repa info`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from dic_repa.cli import completion
from dic_repa.cli.options import Count, json_option, set_option
from dic_repa.errors import unknown_name
from dic_repa.recipe import list_recipes, load_training_recipe
from dic_repa.runtime.progress import print_result, progress_bar
from dic_repa.runtime.table import format_rows

if TYPE_CHECKING:
    from dic_repa.models.pretrained import Pretrained


@click.command("info")
@click.argument("names", nargs=-1, shell_complete=completion.recipes)
@click.option(
    "--size",
    "sizes",
    type=Count(4, "size"),
    multiple=True,
    help="Height and width of the latent.  [default: of 256 and 512 px]",
)
@set_option("a recipe")
@json_option(", unrounded")
def command(names: tuple[str, ...], sizes: tuple[int, ...], overrides: tuple[str, ...], as_json: bool):
    """Parameters and multiply-accumulates (MACs; papers call them FLOPs) of models or recipes.

    By default, of all models with patch size 2 or without patches.

    NAMES are recipes, models or patterns of models. A DiC is counted with 4 input and 8 output channels and 1000
    classes, or with the latents that its name says (f16, f32), a transformer as in its paper, with attention's
    products, SongUNet for CIFAR-10; a recipe with its own sizes.
    "With Winograd": the blocks' 3x3 convolutions then take 2.25 times fewer multiplications. Below the table is what
    the sources of the papers' models count.

    \b
    Examples:
      dic-repa info
      dic-repa info DiC-XL DiT-XL/2 --size 32
      dic-repa info 'DiT-*/4'
      dic-repa info digits-urepa
      dic-repa info ladder-1-isotropic ladder-8-gelu    recipes need no data for this: ImageNet's latents are assumed
    """
    import torch

    from dic_repa.models import list_denoisers, measure_cost
    from dic_repa.models.registry import preset_counts

    wanted = names or [name for name in list_denoisers() if not name.endswith(("/4", "/8"))]
    found = [model_name for name in wanted for model_name in list_denoisers(name) or [name]]
    rows = []
    for model_name in progress_bar(found, desc="counting", leave=False, disable=len(found) < 8):  # a few take no time
        with torch.device("meta"):
            models = _models(model_name, sizes, overrides)
        for size, model in models:
            row = {"model": model_name, "size": size, **vars(measure_cost(model, size))}
            if counts := preset_counts(model_name):
                numbers = {"parameters_M": counts.parameters, "GMACs": counts.gmacs.get(size)}
                row["source"] = {**numbers, "name": counts.source}
            rows.append(row)
    if as_json:
        print_result(json.dumps(rows, indent=2))
        return
    heading = ["model", "latent", "params (M)", "GMACs", "with Winograd"]
    cells = [
        [row["model"], f"{row['size']}x{row['size']}", _in(row["parameters"], 1e6), _in(row["macs"], 1e9),
         _in(row["winograd_macs"], 1e9, 1)]
        for row in rows
    ]  # fmt: skip
    print_result(format_rows([heading, *cells], left=[0]))
    told = [row for row in rows if "source" in row]
    counted = {row["model"] for row in told if row["source"]["GMACs"]}
    theirs = [_theirs(row) for row in told if row["source"]["GMACs"] or row["model"] not in counted]
    if theirs:
        print_result("\nwhat their sources count")
        print_result(format_rows([["model", "latent", "params (M)", "GMACs", "source"], *theirs], left=[0, 4]))


def _theirs(row: dict) -> list[str]:
    counts = [f"{value:g}" if (value := row["source"][key]) else "" for key in ("parameters_M", "GMACs")]
    return [row["model"], f"{row['size']}x{row['size']}", *counts, row["source"]["name"]]


def _models(name: str, sizes: tuple[int, ...], overrides: tuple[str, ...]) -> list[tuple[int, Pretrained]]:
    """Each size with the model or recipe of that `name`: one model for all sizes, if possible."""
    from dic_repa.models import create_denoiser, list_denoisers
    from dic_repa.models.registry import preset_counts, preset_latent
    from dic_repa.recipe.build import build_denoiser, data_traits, import_plugins

    if name not in list_denoisers():
        if not name.endswith((".yaml", ".yml")) and name not in list_recipes():
            models = list_denoisers()
            others = set(list_recipes()) - {model.lower() for model in models}  # dic-xl is near DiC-XL anyway
            raise unknown_name("model or recipe", name, [*models, *others])
        recipe = load_training_recipe(name, overrides)
        import_plugins(recipe)
        data, _ = data_traits(recipe.data)
        model = build_denoiser(recipe.model, data.channels, data.condition)
        return [(size, model) for size in sizes or (recipe.data.size,)]
    if latent := preset_latent(name):
        channels, size = latent
        model = create_denoiser(name, channels)
        return [(each, model) for each in sizes or (size, 2 * size)]
    counts = preset_counts(name)
    options = counts.options if counts else {}
    model = create_denoiser(name, **options)
    if own_size := getattr(model, "size", None):  # its positions are learnt for one size
        return [(size, create_denoiser(name, **options, size=size)) for size in sizes or (own_size,)]
    return [(size, model) for size in sizes or (32, 64)]


def _in(count: int | None, unit: float, digits: int = 2) -> str:
    """`count` in millions or billions, with more digits where the number is small; nothing for None."""
    if count is None:
        return ""
    value = count / unit
    return f"{value:.{digits}f}" if value >= 1 else f"{value:.3g}"
