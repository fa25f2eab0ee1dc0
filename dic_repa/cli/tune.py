"""`dic-repa tune`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from dic_repa.cli import completion
from dic_repa.cli.options import PATH, Command, Count, Several, option_group
from dic_repa.cli.sampling_options import sample_settings, sampling_option
from dic_repa.errors import is_main_process, when_interrupted
from dic_repa.files.outputs import check_folder
from dic_repa.recipe import GuidanceSection
from dic_repa.runtime.progress import print_result, say
from dic_repa.runtime.table import number
from dic_repa.runtime.threads import choose_threads

IMAGES = Count(2, "images")
SAMPLING = ("solver", "steps", "batch_size", "autoencoder", "seed")
GUIDANCE = ("weak", "scale", "interval", "internal", "internal_interval")


def _pair(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise click.BadParameter(f"takes pairs such as 0:0.7,0.2:0.8, not '{text}'") from None
    return low, high


def options_of(given: dict[str, Any]) -> list[str]:
    """Options of `dic-repa sample` with these values."""
    pairs = ((name, value if isinstance(value, tuple) else (value,)) for name, value in given.items())
    return [word for name, values in pairs for word in (f"--{name.replace('_', '-')}", *map(str, values))]


@click.command("tune", cls=Command)
@click.argument("checkpoint", type=PATH, shell_complete=completion.runs)
@option_group(
    "What is tried, and which score counts",
    click.option(
        "--metric", "score", help="fd-digits or recognised for digits, fid, ...  [default: the recipe's judge's]"
    ),
    click.option(
        "--search",
        type=click.Choice(["guidance", "internal"]),
        help="guidance: towards the class, or with --weak away from a weaker model; internal: away from the model's "
        "middle head.  [default: what the model has]",
    ),
    click.option("--reference", help="Real images for fid and its like.  [default: the recipe's]"),
    click.option("--scales", type=Several(float), default="1,1.25,1.5,1.75,2,2.5", help="Guidance scales to try."),
    click.option(
        "--intervals",
        metavar="LOW:HIGH,...",
        type=Several(_pair),
        default="0:0.5,0:0.7,0:0.85,0:1,0.2:0.8",
        help="Intervals of t to try (0 data, 1 noise).",
    ),
    click.option("--num", type=IMAGES, help="Samples of each cell.  [default: a tenth, from 200 to 5000]"),
    click.option("--confirm", type=Count(0), default=3, help="Best cells to sample anew."),
    click.option("--confirm-num", type=IMAGES, help="Samples of each of them.  [default: the recipe's num]"),
    click.option("--out", type=PATH, help="Folder for the results.  [default: RUN/tune]"),
)
@option_group(
    "How it is sampled, if not as the recipe says",
    *map(sampling_option, SAMPLING),
)
@option_group(
    "The other guidance, which stays as it is",
    *map(sampling_option, GUIDANCE),
)
def command(checkpoint: Path, out: Path | None, confirm: int, **options):
    """Find the guidance scale and interval with which CHECKPOINT (a run or a checkpoint) scores best.

    A grid is tried with few samples and the same noise everywhere, then the best are confirmed with many. Prints the
    options to use; writes tune.json and the heat map tune.png. If it is stopped, the same command goes on with the
    missing cells; a finer grid keeps those that are there.

    \b
    Examples:
      dic-repa tune runs/digits-urepa
      dic-repa tune runs/digits-urepa --metric recognised --scales 1,1.5,2,3 --intervals 0:0.7,0:1
      dic-repa tune runs/digits-urepa --weak earlier                        autoguidance
      dic-repa tune runs/digits-internal --search internal                  internal guidance
      dic-repa tune runs/xl-internal --search internal --scale 1.35         beside guidance towards the class
      dic-repa tune runs/xl --metric fid --reference VIRTUAL_imagenet256_labeled.npz --num 5000 --confirm-num 50000
    """
    if out:
        check_folder(out, "tune")
    if not is_main_process():
        return  # it does not share its work, and two would write the same files

    import torch

    from dic_repa.evaluation.judge import notes_on_scores, real_name
    from dic_repa.evaluation.metrics import title
    from dic_repa.evaluation.tune import SEARCHES, Cell, Tuner
    from dic_repa.runtime.progress import progress_bar
    from dic_repa.sampling.load import load

    choose_threads()
    loaded = load(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    sampling = {name: value for name in SAMPLING + GUIDANCE if (value := options.pop(name)) is not None}
    base = loaded.recipe.sample
    if base.guidance is None:  # the search gives the scale, which an option such as --weak would ask for
        base = base.model_copy(update={"guidance": GuidanceSection(scale=1.0)})
    sample = sample_settings(base, **sampling)
    tuner = Tuner(loaded, sample=sample, confirm=confirm, out=out, **options)
    cells = len(tuner.cells())
    total = cells * tuner.num + min(confirm, cells) * tuner.confirm_num
    kept = f"interrupted; the finished cells are in {tuner.file}, and the same command goes on with the others"
    with when_interrupted(lambda: kept), progress_bar(total=total, unit="image", desc="tuning", delay=0.1) as bar:

        def progress(cell: Cell | None, count: int) -> None:
            if cell is None:
                bar.update(count)
            else:
                bar.total = (bar.total or 0) - count  # there already, so no work of this call
                bar.write(f"{cell.options:32} {cell.num:6} samples  {title(tuner.score)} {cell.value:.4g}")

        best = tuner.run(progress)[0]
    print_result(f"best {title(tuner.score)}: {best.value:.4g} with {best.num} samples")
    if tuner.score in tuner.real:
        reached = f"{title(tuner.score)} {number(tuner.real[tuner.score])} with {tuner.real.get('count')} images"
        print_result(f"real {real_name(loaded.recipe)}: {reached}")
    for note in notes_on_scores([tuner.score], loaded.recipe):
        say(f"note: {note}")
    searched = SEARCHES[tuner.search]
    others = {name: value for name, value in sampling.items() if name not in searched}
    given = "".join(f" {shlex.quote(word)}" for word in options_of(others))
    print_result(f"use: dic-repa sample {checkpoint} {best.options}{given}")
    print_result(f"heat map: {tuner.picture}; record: {tuner.file}")
