"""`dic-repa bench data`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.options import Count
from dic_repa.errors import UserError
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
    from accelerate import Accelerator

    from dic_repa.data.speed import loader_speed
    from dic_repa.recipe.build import build_dataset, import_plugins
    from dic_repa.training import train
    from dic_repa.training.inputs import PREFETCH, batches

    settings = load_training_recipe(recipe, overrides)
    import_plugins(settings)
    data, accelerator = build_dataset(settings.data), Accelerator()
    half = -(-steps // 2)  # the first half warms up, and is not reported
    with tempfile.TemporaryDirectory() as folder:
        speeds = _reading_and_preparing(data, Path(folder), samples, encoded, accelerator.device)
        speeds["loader"] = loader_speed(
            batches(data, settings, accelerator, start=0), samples, settings.data.workers, PREFETCH
        )
        settings.train.steps, settings.train.log_every = 2 * half, half
        settings.train.sample_every, settings.train.checkpoint_every = 0, 2 * half
        run = train(settings, Path(folder) / "run")
        last = json.loads(run.metrics_file.read_text().splitlines()[-1])
    result = {
        "images_per_second": speeds,
        "to_loose_files": {name: speed / speeds["loose files"] for name, speed in speeds.items()},
        "training_images_per_second": last["images_per_second"],
        "waiting_share": last["data_wait"],
        "workers": settings.data.workers,
    }
    click.echo(json.dumps(result, indent=2) if as_json else _table(result))


def _reading_and_preparing(data, folder: Path, samples: int, encoded: int, device) -> dict[str, float]:
    from dic_repa.data.autoencoders import load_autoencoder
    from dic_repa.data.latents import LatentDataset
    from dic_repa.data.speed import loose_files_speed, prepare_speed, write_loose_files

    stems = write_loose_files(data, folder / "loose", samples)
    speeds = {"loose files": loose_files_speed(stems)}
    size = data[0]["image"].shape[-1] if "image" in data[0] else 0
    if size >= 8:
        speeds["prepare, no autoencoder"] = prepare_speed(
            folder / "loose", folder / "pixels", load_autoencoder("none"), size
        )
    if size >= 8 and isinstance(data, LatentDataset) and data.spec.name != "none":
        try:
            autoencoder = data.autoencoder.to(device)
        except UserError as error:  # training needs only the moments
            click.echo(f"prepare with {data.spec.name} is not measured: {error}", err=True)
            return speeds
        write_loose_files(data, folder / "few", encoded)
        speeds[f"prepare, {data.spec.name}"] = prepare_speed(folder / "few", folder / "latents", autoencoder, size)
    return speeds


def _table(result: dict) -> str:
    width = max(map(len, result["images_per_second"]))
    lines = [
        f"{name:{width}} {speed:10.0f} images/s   {result['to_loose_files'][name]:6.2f} of loose files one by one"
        for name, speed in result["images_per_second"].items()
    ]
    lines.append(f"{'training':{width}} {result['training_images_per_second']:10.0f} images/s")
    return "\n".join([*lines, f"waiting for data {result['waiting_share']:.1%} of a step, {result['workers']} workers"])
