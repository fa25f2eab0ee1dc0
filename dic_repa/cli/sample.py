"""`dic-repa sample`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dic_repa.errors import UserError
from dic_repa.recipe import SampleSection, load_recipe, validate


@click.command("sample")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the images.  [default: samples/NAME]")
@click.option("--recipe", help="A recipe whose `sample` section to use.  [default: the run's own]")
@click.option("--num", type=int, help="How many images.")
@click.option("--classes", help="Which classes, such as 3 or 0,4,7 or 0-9.  [default: all, in turn]")
@click.option("--solver", help="euler, heun (ODE) or euler_maruyama (SDE).")
@click.option("--steps", type=int, help="Solver steps.")
@click.option("--scale", type=float, help="Guidance: 1 is none, above goes towards the class.")
@click.option("--interval", type=(float, float), help="The times in which guidance acts; 0 is data, 1 is noise.")
@click.option("--batch-size", type=int, help="Images at once; changes no image.")
@click.option("--seed", type=int, help="With an image's index it determines the image's noise.")
@click.option("--overwrite", is_flag=True, help="Write into a folder that holds samples already.")
def command(checkpoint: Path, out: Path | None, recipe: str | None, classes: str | None, overwrite: bool, **options):
    """Sample from CHECKPOINT: a run's folder, one of its checkpoints, or an inference checkpoint.

    Writes 000000.png, 000001.png, ..., grid.png and samples.json, which has each image's label and all settings. An
    image depends on the seed, its index and its class alone, whatever the batch size.

    \b
    Examples:
      dic-repa sample runs/digits-urepa --num 100
      dic-repa sample runs/digits-urepa --recipe digits-cfg --out samples/guided
      dic-repa sample runs/digits-urepa --classes 3,7 --scale 2 --interval 0 0.7 --solver heun --steps 20
    """
    import torch

    from dic_repa.data import datasets
    from dic_repa.generation import balanced_labels, generate_from, load_checkpoint, save_grid, save_png

    loaded = load_checkpoint(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    base = load_recipe(recipe).sample if recipe else loaded.recipe.sample
    settings = sample_settings(base, **options)
    labels = balanced_labels(settings.num, parse_classes(classes, loaded.denoiser.num_classes))
    out = out or Path("samples") / checkpoint.resolve().name
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists; pass --overwrite, or another folder with --out")
    out.mkdir(parents=True, exist_ok=True)

    images = []
    with click.progressbar(length=len(labels), label="sampling", show_pos=True) as bar:
        for batch in generate_from(loaded, settings, labels):
            for image in batch:
                save_png(image, out / f"{len(images):06d}.png")
                images.append(image)
            bar.update(len(batch))
    class_names = datasets.get(loaded.recipe.data.name).class_names
    save_grid(torch.stack(images), out / "grid.png", labels, class_names, columns=10)
    record = {"checkpoint": str(loaded.source), "sample": settings.model_dump(mode="json"), "labels": labels.tolist()}
    (out / "samples.json").write_text(json.dumps(record) + "\n")
    click.echo(f"{len(images)} images and a picture of them: {out / 'grid.png'}")


def sample_settings(base: SampleSection, scale=None, interval=None, **options) -> SampleSection:
    """`base` with the options that were given, validated as if they stood in a recipe."""
    raw = base.model_dump() | {name: value for name, value in options.items() if value is not None}
    if scale is not None or interval is not None:
        guidance = dict(raw["guidance"] or {})
        guidance |= {} if scale is None else {"scale": scale}
        guidance |= {} if interval is None else {"interval": interval}
        raw["guidance"] = guidance
    return validate({"sample": raw}, "sampling").sample


def parse_classes(text: str | None, num_classes: int) -> list[int]:
    """'3', '0,4,7' and '0-9' as lists of classes; a UserError names what is out of range."""
    if text is None:
        return list(range(num_classes))
    classes = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--classes takes numbers and ranges such as 0,4,7 or 0-9, not '{text}'")
        classes += range(int(first), int(last or first) + 1)
    if not classes or max(classes) >= num_classes:
        raise UserError(f"--classes {text}: the model has the classes 0 to {num_classes - 1}")
    return classes
