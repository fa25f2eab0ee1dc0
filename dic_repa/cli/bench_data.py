"""`dic-repa bench data`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from dic_repa.recipe import load_training_recipe


@click.command("data")
@click.argument("recipe")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
)
@click.option("--samples", type=click.IntRange(1), default=2000, show_default=True, help="How many to read.")
@click.option("--steps", type=click.IntRange(2), default=20, show_default=True, help="Training steps to time.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(recipe: str, overrides: tuple[str, ...], samples: int, steps: int, as_json: bool):
    """Images per second of RECIPE's data, and the share of a training step that is spent waiting for them.

    The loader is compared with a plain loop over the same samples as loose files, one at a time. Then the recipe is
    trained for some steps; a waiting share above a few percent calls for more data.workers.
    """
    from accelerate import Accelerator

    from dic_repa.build import build_dataset, import_plugins
    from dic_repa.data.speed import loader_speed, loose_files_speed
    from dic_repa.training import train
    from dic_repa.training.loop import batches
    from dic_repa.training.run_folder import RunFolder

    settings = load_training_recipe(recipe, overrides)
    import_plugins(settings)
    data = build_dataset(settings.data)
    loose = loose_files_speed(data, samples)
    loader = loader_speed(batches(data, settings, Accelerator(), start=0), samples)

    half = -(-steps // 2)  # the first half warms up, and is not reported
    settings.train.steps, settings.train.log_every = 2 * half, half
    settings.train.sample_every, settings.train.checkpoint_every = 0, 2 * half
    with tempfile.TemporaryDirectory() as folder:
        run: RunFolder = train(settings, Path(folder) / "run")
        last = json.loads(run.metrics_file.read_text().splitlines()[-1])
    result = {
        "loader_images_per_second": loader,
        "loose_files_images_per_second": loose,
        "loader_to_loose_files": loader / loose,
        "training_images_per_second": last["images_per_second"],
        "waiting_share": last["data_wait"],
        "workers": settings.data.workers,
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(f"loader, {settings.data.workers} workers     {loader:10.0f} images/s")
    click.echo(f"loose files, one by one {loose:10.0f} images/s   (the loader: {loader / loose:.2f} times that)")
    click.echo(f"training                {last['images_per_second']:10.0f} images/s")
    click.echo(f"waiting for data        {last['data_wait']:10.1%} of a step")
