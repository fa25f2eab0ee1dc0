"""`dic-repa sample`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

from dic_repa.errors import UserError
from dic_repa.recipe import SampleSection, load_recipe, parse_value, validate
from dic_repa.samplers.catalog import DIFFUSION_FORMS, GUIDANCE_SCHEDULES, LAST_STEPS, TIME_GRIDS, solver_info


def _choices(title: str, known: dict[str, str]) -> str:
    width = max(map(len, known))
    return f"\b\n{title}\n" + "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in known.items()) + "\n\n"


_EPILOG = (
    _choices("Time grids (--grid; arguments behind a colon: shifted:shift=3):", TIME_GRIDS)
    + _choices("Diffusion forms of an SDE (--diffusion):", DIFFUSION_FORMS)
    + _choices("Last steps of an SDE (--last-step):", LAST_STEPS)
    + _choices("Guidance schedules (--schedule):", GUIDANCE_SCHEDULES)
)
_SOLVER_KEYS = ("steps", "rtol", "atol", "diffusion", "diffusion_norm", "last_step", "last_step_size", "eta")
_GUIDANCE_KEYS = ("scale", "interval", "channels", "schedule", "rescale", "weak", "kind")


def sampling_options(command: Callable) -> Callable:
    """The options that override a recipe's `sample` section; `sample_settings` takes them."""
    for option in reversed(
        [
            click.option("--num", type=int, help="How many images."),
            click.option("--solver", help="A name from `dic-repa solvers`."),
            click.option("--steps", type=int, help="Steps of a fixed-step solver."),
            click.option("--rtol", type=float, help="Relative tolerance of an adaptive solver.  [default: 1e-5]"),
            click.option("--atol", type=float, help="Absolute tolerance of an adaptive solver.  [default: 1e-5]"),
            click.option("--grid", help="Where the steps are, see below.  [default: uniform]"),
            click.option("--diffusion", help="How much noise an SDE adds, see below.  [default: linear]"),
            click.option("--diffusion-norm", type=float, help="Multiplies the diffusion.  [default: 1]"),
            click.option("--last-step", help="How an SDE ends, see below.  [default: mean]"),
            click.option("--last-step-size", type=float, help="The time that this step covers.  [default: 0.04]"),
            click.option("--eta", type=float, help="Noise of ddim, from 0 to 1.  [default: 0]"),
            click.option("--scale", type=float, help="Guidance: 1 is none, above goes towards the class."),
            click.option("--interval", type=(float, float), help="When guidance acts; 0 is data, 1 is noise."),
            click.option("--channels", type=int, help="Guide the first so many channels only."),
            click.option("--schedule", help="How the scale changes over the interval, see below."),
            click.option("--rescale", type=float, help="Share to which guidance keeps the contrast, from 0 to 1."),
            click.option("--cfgpp", "kind", flag_value="cfg++", help="CFG++: a --scale from 0 to 1, fixed steps."),
            click.option("--weak", help="Autoguidance: a run or checkpoint of a weaker model to move away from."),
            click.option("--batch-size", type=int, help="Images at once; changes no image."),
            click.option("--seed", type=int, help="With an image's index it determines the image's noise."),
        ]
    ):
        command = option(command)
    return command


@click.command("sample", epilog=_EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the images.  [default: samples/NAME]")
@click.option("--recipe", help="A recipe whose `sample` section to use.  [default: the run's own]")
@click.option("--classes", help="Which classes, such as 3 or 0,4,7 or 0-9.  [default: all, in turn]")
@click.option("--overwrite", is_flag=True, help="Write into a folder that holds samples already.")
@sampling_options
def command(checkpoint: Path, out: Path | None, recipe: str | None, classes: str | None, overwrite: bool, **options):
    """Sample from CHECKPOINT: a run's folder, one of its checkpoints, or an inference checkpoint.

    Writes 000000.png, 000001.png, ..., grid.png and samples.json, which has each image's label and all settings. An
    image depends on the seed, its index and its class alone, whatever the batch size and the number of processes.

    Which solver? heun with 20 to 50 steps is a safe choice; ab2 or dpmpp-2m where evaluations are dear; euler_maruyama
    with 250 steps is what the papers report; dopri5 (no --steps, but --rtol and --atol) where accuracy matters most.

    \b
    Examples:
      dic-repa sample runs/digits-urepa --num 100
      dic-repa sample runs/digits-urepa --recipe digits-cfg --out samples/guided
      dic-repa sample runs/digits-urepa --classes 3,7 --scale 2 --interval 0 0.7 --solver ab2 --steps 30
      dic-repa sample runs/digits-urepa --solver euler_maruyama --steps 250 --diffusion sigma --last-step tweedie
      dic-repa sample runs/digits-urepa --solver dopri5 --rtol 1e-4 --atol 1e-4
      accelerate launch -m dic_repa sample runs/digits-urepa --num 50000        on all GPUs of this machine
    """
    from accelerate import Accelerator

    from dic_repa.generation import balanced_labels, build_sampler, load_checkpoint, save_png

    processes = Accelerator()
    loaded = load_checkpoint(checkpoint, processes.device)
    settings = sample_settings(load_recipe(recipe).sample if recipe else loaded.recipe.sample, **options)
    labels = balanced_labels(settings.num, parse_classes(classes, loaded.denoiser.num_classes))
    sampler = build_sampler(loaded, settings)
    out = out or Path("samples") / checkpoint.resolve().name
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists; pass --overwrite, or another folder with --out")
    processes.wait_for_everyone()  # before one of them writes what another would find
    out.mkdir(parents=True, exist_ok=True)

    mine = range(processes.process_index, len(labels), processes.num_processes)
    done = iter(mine)
    quiet = not processes.is_main_process
    with click.progressbar(length=len(mine), label="sampling", show_pos=True, hidden=quiet) as bar:
        for batch in sampler(labels[list(mine)], mine):
            for image in batch:
                save_png(image, out / f"{next(done):06d}.png")
            bar.update(len(batch))
    processes.wait_for_everyone()
    if processes.is_main_process:
        _finish(out, loaded, settings, labels, sampler.evaluations)
    processes.end_training()


def _finish(out: Path, loaded, settings: SampleSection, labels, evaluations: int) -> None:
    """Write what belongs to all of the images: the grid of some, and the record."""
    import torch

    from dic_repa.build import build_class_names
    from dic_repa.generation import load_png, save_grid

    columns = 10
    shown = [i for label in labels.unique() for i in (labels == label).nonzero()[:columns, 0].tolist()]
    images = torch.stack([load_png(out / f"{i:06d}.png") for i in shown])
    class_names = build_class_names(loaded.recipe.data, loaded.denoiser.num_classes)
    save_grid(images, out / "grid.png", labels[shown], class_names, columns)
    record = {
        "checkpoint": str(loaded.source),
        "sample": settings.model_dump(mode="json"),
        "evaluations_per_image": evaluations,
        "labels": labels.tolist(),
    }
    (out / "samples.json").write_text(json.dumps(record) + "\n")
    click.echo(f"{len(labels)} images, {evaluations} evaluations each, and a picture of them: {out / 'grid.png'}")


def sample_settings(base: SampleSection, **options) -> SampleSection:
    """`base` with the options that were given, validated as if they stood in a recipe."""
    given = {name: value for name, value in options.items() if value is not None}
    raw = base.model_dump(mode="json")
    if (solver := given.get("solver")) and _family(solver) != _family(base.solver):
        raw |= dict.fromkeys(_SOLVER_KEYS)  # what the recipe says of another kind of solver does not fit this one
    if "grid" in given:
        given["grid"] = _parse_grid(given["grid"])
    guidance = {name: given.pop(name) for name in _GUIDANCE_KEYS if name in given}
    if guidance:
        raw["guidance"] = {**(raw["guidance"] or {}), **guidance}
    return validate({"sample": raw | given}, "sampling").sample


def _family(solver: str) -> tuple[str, str]:
    info = solver_info(solver)
    return info.process, info.kind


def _parse_grid(text: str) -> dict:
    name, _, arguments = text.partition(":")
    pairs = [pair.partition("=") for pair in arguments.split(",") if pair]
    return {"name": name, "options": {key.strip(): parse_value(value) for key, _, value in pairs}}


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
