"""`dic-repa prepare`."""

import contextlib
from pathlib import Path

import click

from dic_repa.cli.options import Command, Count, option_group
from dic_repa.errors import UserError, first_few, print_rank_errors, when_interrupted
from dic_repa.files.outputs import check_folder
from dic_repa.files.reading import read_json
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.threads import choose_threads


@click.command("prepare", cls=Command)
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@option_group(
    "Which images, and of which classes",
    click.option("--labels", help="A file for flat images: CSV rows 'file,label', or JSON as REPA's dataset.json."),
    click.option("--unlabelled", is_flag=True, help="No image has a class, in any folder."),
    click.option(
        "--skip-bad", is_flag=True, help="Leave out damaged files and those that are no images; name them at the end."
    ),
)
@option_group(
    "What becomes of them",
    click.option("--size", type=Count(8, "size"), default=256, help="Of the centre crop, in pixels."),
    click.option(
        "--autoencoder",
        default="stabilityai/sd-vae-ft-ema",
        help="A name that `dic-repa autoencoders` lists, a hub id or a folder of diffusers' files (:SUBFOLDER "
        "within a pipeline), or a file in LDM's layout; none: pixels.",
    ),
    click.option("--flip", is_flag=True, help="Store the mirrored images' moments too, and train on both."),
    click.option(
        "--format",
        "layout",
        type=click.Choice(["arrow", "webdataset"]),
        default="arrow",
        help="arrow: for a disk of this machine; webdataset: tar shards, which a web server can give too.",
    ),
    click.option(
        "--images",
        "image_format",
        type=click.Choice(["webp", "png", "jpeg"]),
        default="webp",
        help="Format of the stored crops: webp and png are lossless, jpeg (quality 95) is half as large.",
    ),
    click.option(
        "--moments",
        type=click.Choice(["float16", "float32"]),
        default="float16",
        help="Numbers of the stored latents: REPA keeps float32, twice as large.",
    ),
)
@option_group(
    "Speed and memory",
    click.option("--shard-size", type=Count(1, "images"), default=1000, help="Images of one shard."),
    click.option("--batch-size", type=Count(1, "batch"), default=32, help="Images encoded at once."),
    click.option("--workers", type=Count(1, "workers"), default=8, help="Threads that read and crop."),
    click.option(
        "--share",
        is_flag=True,
        help="Share the work with the same command on other machines that see DESTINATION, or on this one: each takes "
        "shards that nobody has.",
    ),
)
def command(
    source: str,
    destination: Path,
    autoencoder: str,
    labels: str | None,
    unlabelled: bool,
    share: bool,
    layout: str,
    **options,
):
    """Crop and encode the images of SOURCE into the data set DESTINATION.

    SOURCE is a folder, zip or tar, a Hugging Face data set (ID, ID:SPLIT or a local folder), or a data set in the
    package (digits, emoji, or such as emoji:held-out). Files have a folder for each class, or a labels file (--labels,
    or dataset.json, labels.json or labels.csv in SOURCE), or are one class. After a stop, the same command makes the
    missing shards. `datasets.load_from_disk` opens the result; a recipe reads it with
    `data: {name: prepared, path: DESTINATION, size: 32}`, or `name: webdataset` after `--format webdataset`.

    \b
    Examples:
      dic-repa prepare imagenet/train data/imagenet256 --skip-bad
      dic-repa prepare pictures.zip data/pictures --size 512 --autoencoder weights/sd-vae-ft-mse
      dic-repa prepare emoji data/emoji --size 32 --autoencoder lite-vae         without a network
      dic-repa prepare photos data/photos --size 64 --autoencoder none           one class; --unlabelled: none
      dic-repa prepare flat/ data/pixels --labels flat.csv --size 64 --autoencoder none
      accelerate launch -m dic_repa prepare imagenet/train data/imagenet256      on all GPUs of this machine
      dic-repa prepare imagenet/train /shared/imagenet256 --share                the same on each of several machines
    """
    check_folder(destination, "prepared")

    from dic_repa.data.autoencoders import load_autoencoder
    from dic_repa.data.prepare import Preparation
    from dic_repa.data.prepare_tars import TarPreparation
    from dic_repa.data.sources import open_source
    from dic_repa.files.claims import Claims
    from dic_repa.files.lock import locked
    from dic_repa.runtime.processes import entered_by_main, on_main_process, start_processes

    choose_threads()
    images = open_source(source, labels, options["skip_bad"], unlabelled)
    state = start_processes()
    options["claims"] = Claims(destination) if share else None
    kind = TarPreparation if layout == "webdataset" else Preparation
    preparation = kind(images, destination, load_autoencoder(autoencoder, state.device), **options)
    with contextlib.nullcontext() if share else entered_by_main(state, lambda: locked(destination)):
        on_main_process(state, preparation.begin)
        begun = f"the finished shards are in {destination}, and the same command goes on with the others"
        with when_interrupted(lambda: f"interrupted; {begun}"), print_rank_errors():
            preparation.write_shards(state.process_index, state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            report = preparation.complete()
            if report is None:
                print_result(f"{destination} is complete: another command has made the last shards and looked back")
                report = read_json(destination / "check.json", "run the same command again")
            _print_report(destination, report, preparation.results[0])
            if report["expected"] and not report["images"]:
                raise UserError(f"not one image of {source} was whole")
    state.end_training()


def _print_report(destination: Path, report: dict, of_latents: str) -> None:
    said = "without classes"
    if report["classes"]:
        (small, few), (large, many) = report["smallest_class"], report["largest_class"]
        each = f"of {few} images each" if few == many else f"from {few} ({small}) to {many} ({large}) images"
        said = f"1 class ({small})" if report["classes"] == 1 else f"{report['classes']} classes {each}"
    print_result(f"{destination}: {report['images']} of {report['expected']} images, {said}")
    for reason, names in report["reasons"].items():
        print_result(f"skipped {len(names)}, {reason}: {first_few(names, 5)}")
    for note in report["notes"]:
        print_result(f"note: {note}")
    if report["empty_classes"]:
        print_result(f"warning: nothing is left of the classes {', '.join(report['empty_classes'][:10])}")
    if report["enlarged"]:
        print_result(f"{report['enlarged']} images were smaller than the crop and have been enlarged")
    if latents := report["latents"]:
        (low, high), (least, most) = ((min(values), max(values)) for values in (latents["mean"], latents["std"]))
        each = f"mean {low:.3g} to {high:.3g}, standard deviation {least:.3g} to {most:.3g}"
        print_result(f"latents of {len(latents['mean'])} channels: {each}; each channel's are in {of_latents}")
    quality = "" if report["psnr"] is None else f"PSNR of the round trip {report['psnr']:.1f} dB; "
    print_result(f"{quality}look at {report['preview']}; all of this is in {destination / 'check.json'}")
