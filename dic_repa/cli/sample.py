"""`dic-repa sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dic_repa.cli import completion
from dic_repa.cli.options import Command, option_group
from dic_repa.cli.sampling_options import EPILOG, load_for_sampling, sampling_options
from dic_repa.errors import UserError, did_you_mean
from dic_repa.files.outputs import check_folder
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.threads import choose_threads

if TYPE_CHECKING:
    from dic_repa.conditions import Condition


@click.command("sample", cls=Command, epilog=EPILOG)
@click.argument("checkpoint", type=click.Path(path_type=Path), shell_complete=completion.runs)
@option_group(
    "What to sample, and where",
    click.option("--out", type=click.Path(path_type=Path), help="Folder for the images.  [default: samples/NAME]"),
    click.option(
        "--recipe",
        shell_complete=completion.recipes,
        help="A recipe whose `sample` section to use.  [default: the run's own]",
    ),
    click.option("--classes", help="Which classes: 3, or 0,4,7, or 0-9, or their names, or none.  [default: all]"),
    click.option(
        "--conditions",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="For a model conditioned on vectors or tokens: an .npy file of them, float, one in each row.  "
        "[default: examples from the training data]",
    ),
    click.option(
        "--format",
        "form",
        type=click.Choice(["png", "npz", "both"]),
        default="png",
        help="PNG files, ADM's samples.npz (arr_0: uint8 N,H,W,3; arr_1: labels), or both.",
    ),
    click.option("--trajectory", is_flag=True, help="Also trajectory.png, a picture of the way from noise to image."),
    click.option("--overwrite", is_flag=True, help="Replace the samples that are there; other files stay."),
)
@sampling_options
def command(
    checkpoint: Path,
    out: Path | None,
    recipe: str | None,
    classes: str | None,
    conditions: Path | None,
    form: str,
    trajectory: bool,
    overwrite: bool,
    **options,
):
    """Sample from CHECKPOINT: a run's folder, one of its checkpoints, or an inference checkpoint.

    Writes 000000.png, 000001.png, ..., grid.png and samples.json, which has each image's label and all settings. An
    image depends only on the seed, its index and its class, whatever the number of processes; another batch size may
    round it differently (with an adaptive solver, whose steps depend on the whole batch, within its tolerances). After
    a stop or a kill, the same command makes the missing images; a larger --num adds to them.

    Which solver? heun with 20 to 50 steps is a safe choice; ab2 or dpmpp-2m for few evaluations; euler_maruyama with
    250 steps is what the papers report; dopri5 (no --steps, but --rtol and --atol) for the highest accuracy.

    An option with [recipe, else ...] overrides that key of the recipe's `sample` section.

    \b
    Examples:
      dic-repa sample runs/digits-urepa --num 100
      dic-repa sample runs/digits-urepa --recipe digits-cfg --out samples/guided
      dic-repa sample runs/digits-urepa --classes 3,7 --scale 2 --interval 0 0.7 --solver ab2 --steps 30
      dic-repa sample runs/digits-urepa --solver euler_maruyama --steps 250 --diffusion sigma --last-step tweedie
      dic-repa sample runs/digits-urepa --solver dopri5 --rtol 1e-4 --atol 1e-4
      accelerate launch -m dic_repa sample runs/digits-urepa --num 50000 --format npz    on all GPUs of this machine
    """
    if out:
        check_folder(out, "samples")  # before torch is imported

    from dic_repa.conditions import read_examples
    from dic_repa.files.lock import locked
    from dic_repa.runtime.processes import entered_by_main, start_processes
    from dic_repa.sampling.folder import SampleFolder, sample_into, sample_spec, save_trajectory
    from dic_repa.sampling.labels import draw_labels

    choose_threads()
    processes = start_processes()
    loaded, settings = load_for_sampling(checkpoint, processes.device, recipe, **options)
    if conditions:
        loaded.condition = read_examples(loaded.condition, conditions)
    chosen = parse_classes(classes, loaded.condition) if classes else None
    labels = draw_labels(loaded.recipe, loaded.condition, settings, chosen)
    sampler = loaded.sampler(settings)  # before the folder is made, since it may fail
    sampler.trace = trajectory
    others = "" if settings.weights == "ema" else f"-{settings.weights}"
    out = out or Path("samples") / f"{checkpoint.resolve().name}{others}"
    folder = SampleFolder(out, sample_spec(loaded, settings, labels, classes))
    if form == "npz" and not overwrite and folder.has_npz():
        folder.check()
        if processes.is_main_process:
            print_result(f"{len(labels)} images are there already: {out / 'samples.npz'}")
        return
    folder.check(overwrite)
    with entered_by_main(processes, lambda: locked(out)):
        sample_into(folder, sampler, labels, processes, overwrite)
        if processes.is_main_process:
            grid = folder.save_grid(loaded.condition.names)
            evaluations = folder.spec["evaluations_per_image"] or "an unknown number of"
            what = "images" if loaded.condition.count else "images without classes"
            print_result(f"{len(labels)} {what}, {evaluations} evaluations each, and a picture of them: {grid}")
            if trajectory and sampler.states:
                save_trajectory(sampler, out / "trajectory.png")
                print_result(f"from noise to image: {out / 'trajectory.png'}")
            if form != "png":
                folder.write_npz()
                print_result(f"for ADM's script: {out / 'samples.npz'}")
            if form == "npz":
                for file in folder.numbered():
                    file.unlink()
    processes.end_training()


def parse_classes(text: str, condition: Condition) -> list[int]:
    """'3', '0,4,7', '0-9', 'cat,dog' or 'none' (the null) as a list of labels; a number is never a class's name."""
    names = condition.names
    if text == "none":
        return [condition.count]
    if "," in text and text in names:
        return [names.index(text)]
    classes: list[int] = []
    for part in map(str.strip, text.split(",")):
        first, dash, last = part.partition("-")
        if first.isdecimal() and (not dash or last.isdecimal()) and len(part) < 20 and int(last or first) >= int(first):
            if int(last or first) >= condition.count:
                raise UserError(f"--classes {part}: the model has {condition.describe_rows()}")
            classes += range(int(first), int(last or first) + 1)
        elif part in names:
            classes.append(names.index(part))
        else:
            named = [name for name in names if not name.isdecimal()]
            instead = f", or names{did_you_mean(part, named)}" if named else f", not '{text}'"
            raise UserError(f"--classes takes numbers and ranges such as 0,4,7 or 0-9{instead}")
    if max(classes) >= condition.count:
        raise UserError(f"--classes {text}: the model has {condition.describe_rows()}")
    return classes
