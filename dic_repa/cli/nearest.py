"""`dic-repa nearest`."""

from __future__ import annotations

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.options import PATH, Between, Command, Count, option_group
from dic_repa.cli.sampling_options import load_for_sampling, sampled_first
from dic_repa.errors import UserError, when_interrupted
from dic_repa.files.outputs import check_file
from dic_repa.runtime.progress import print_result, progress_bar
from dic_repa.runtime.table import format_rows, number
from dic_repa.runtime.threads import choose_threads


@click.command("nearest", cls=Command)
@click.argument("samples", type=PATH, shell_complete=completion.runs)
@option_group(
    "What is compared, and how",
    click.option("--reference", required=True, help="What was trained on: emoji:train, a folder, zip, .npz, ..."),
    click.option("--bound", help="Real images that were not: emoji:held-out, ...  [default: the reference's own]"),
    click.option(
        "--extractor", default="lite2", help="Whose features are compared: `dic-repa parts feature-extractor`."
    ),
    click.option("--flip/--no-flip", default=True, help="A mirrored copy is a copy."),
    click.option("--share", type=Between(0, 1), default=0.01, help="Of the real images that may be as near as a copy."),
    click.option("--resize", type=Count(8, "size"), metavar="SIZE", help="Crop all images to SIZE first."),
    click.option("--rows", type=click.IntRange(1, 20), default=20, help="Samples in the picture."),
    click.option("--closest", is_flag=True, help="Show those that are nearest by features, not the first."),
    click.option("--out", type=PATH, help="The picture; its record is beside it, a .json.  [default: nearest.png]"),
)
@sampled_first
def command(samples: Path, out: Path | None, **options):
    """Are SAMPLES (a run, a checkpoint, a folder or an .npz) copies of training pictures?

    The picture has a row for each sample: it, then its three nearest training pictures by the features of a network,
    and three by pixels; a word beside its number says by what it is a near copy, or that it is an exact one. The table
    has the share of near copies among all samples. A sample is a near copy if it is nearer to its nearest training
    picture than all but 1 % (--share) of other real images are to theirs; so 1 % are expected of samples that are like
    these. The other real images are --bound, or else training pictures, each compared with the others. Exact copies,
    the same to the pixel, always count.

    \b
    Examples:
      dic-repa nearest runs/emoji-urepa --reference emoji:train --bound emoji:held-out --num 1000
      dic-repa nearest samples/mine --reference data/pictures --resize 64 --closest
      dic-repa nearest theirs.npz --reference imagenet/train --extractor dinov2 --out copies.png
    """
    from dic_repa.files.pictures import check_figure

    out = out or Path("nearest.png")
    check_figure(out, (".png",))
    check_file(out.with_suffix(".json"))
    with when_interrupted(lambda: "interrupted; samples that are drawn are kept, and the same command takes them"):
        show_nearest(samples, out, **options)


def show_nearest(path: Path, out: Path, reference: str, bound: str | None, share: float, rows: int, **options) -> None:
    """Sample if `path` is a run, look for copies, print a table, and write picture and record."""
    from dic_repa.evaluation import open_images
    from dic_repa.evaluation.judge import own_encoder, real_images
    from dic_repa.evaluation.nearest import find_copies, save_copies
    from dic_repa.evaluation.runs import is_checkpoint, sample_checkpoint
    from dic_repa.runs.folder import suggest_runs
    from dic_repa.runtime.processes import start_processes

    if not path.exists() and (hint := suggest_runs(path)):
        raise UserError(f"there are no samples at {path}{hint}")
    choose_threads()
    processes = start_processes()
    place, recipe = path, None
    if is_checkpoint(path):
        loaded = load_for_sampling(path, processes.device, **options)
        place, recipe = sample_checkpoint(path, *loaded, processes, options["again"]), loaded[0].recipe
    if processes.is_main_process:  # the other processes shared the sampling
        of_run = lambda source: real_images(recipe, source) if recipe and source else source  # noqa: E731
        sources = (place, of_run(reference), of_run(bound))
        sets = [None if source is None else open_images(source, options["resize"]) for source in sources]
        images, real, other = sets
        assert images is not None
        assert real is not None
        name = options["extractor"]
        given = own_encoder(recipe).get(name, {}) if recipe else {}
        total = sum(len(one) for one in sets if one is not None)
        with progress_bar(total=total, unit="image", desc="comparing", delay=0.1) as bar:
            found = find_copies(images, real, other, name, given, options["flip"], processes.device, bar.update)
        nearest = found.copies[name].distances[:, 0]
        shown = (nearest.argsort() if options["closest"] else range(len(images)))[:rows]
        record = save_copies(
            out, images, real, found, [int(row) for row in shown], share, extractor=name, flip=options["flip"]
        )
        _print(found, share, len(images))
        print_result(f"picture: {out}; record: {record}")
    processes.end_training()


def _print(found, share: float, count: int) -> None:
    scores = found.scores(share)
    table = [("distance by", "near copies", "share", "median", "of real images")]
    for name in found.copies:
        of_it = scores[name]
        medians = [number(of_it[key]) for key in ("median_distance", "median_distance_of_real")]
        table.append((name, f"{of_it['near_copies']} of {count}", number(of_it["share"]), *medians))
    print_result(format_rows(table, left=(0,)))
    print_result(f"exact copies: {scores['exact_copies']} of {count}")
    print_result(f"near: as only {share:.2%} of {found.calibrated_by}")
