"""`dic-repa evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.judgements import evaluate_and_show, show_epochs, ways_to_choose
from dic_repa.cli.options import PATH, Command, Count, Several, option_group
from dic_repa.cli.sampling_options import load_for_sampling, sampled_first
from dic_repa.errors import UserError, print_rank_errors, unknown_name, when_interrupted
from dic_repa.files.outputs import check_file
from dic_repa.runtime.progress import print_result, progress_bar, say
from dic_repa.runtime.table import format_rows, number
from dic_repa.runtime.threads import choose_threads

ADM = ["fid", "sfid", "is", "prec", "recall"]


@click.command("evaluate", cls=Command)
@click.argument("samples", nargs=-1, required=True, type=PATH, shell_complete=completion.runs)
@option_group(
    "Metrics and their reference",
    click.option(
        "--reference",
        help="Real images: a folder, zip or tar, an .npz, a prepared data set, statistics, or a name: digits:train.",
    ),
    click.option("--bound", help="Real images that are not trained on, scored as samples are: emoji:held-out."),
    click.option("--both", is_flag=True, help="Sample with balanced and again with random classes: a row for each."),
    click.option(
        "--metrics", type=Several(str), help=f"Names from --list-metrics, with commas.  [default: {','.join(ADM)}]"
    ),
    click.option(
        "--list-metrics",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=lambda *arguments: _list_metrics(*arguments),
        help="List the metrics.",
    ),
    click.option("--fid-infinity", is_flag=True, help="Also extrapolate FID to infinitely many samples."),
    click.option(
        "--epochs-to", type=float, metavar="SCORE", help="Tell when each run reached it, by the scores that it has."
    ),
    click.option("--bootstrap", type=Count(2, "repeats"), metavar="N", help="Confidence intervals from N resamplings."),
    click.option("--resize", type=Count(8, "size"), metavar="SIZE", help="Crop all images to SIZE first, as ADM does."),
    click.option("--out", type=PATH, help="The record.  [default: metrics.json beside SAMPLES]"),
)
@option_group(
    "Networks that look at the images",
    click.option("--inception-weights", type=PATH, help="A file of torch-fidelity's format."),
    click.option("--dinov2-weights", type=PATH, help="A file of DINOv2 ViT-L/14 weights."),
    click.option("--dinov2-encoder", shell_complete=completion.encoders, help="Another ViT in DINOv2's place."),
    click.option(
        "--feature-weights", metavar="NAME=FILE", multiple=True, help="Of clip, siglip, mae, convnext, dinov2-256."
    ),
    click.option("--encoder", shell_complete=completion.encoders, help="For fd-encoder, ...  [default: the run's own]"),
    click.option("--encoder-weights", type=PATH, help="A file of that encoder's weights."),
    click.option(
        "--encoder-option", "encoder_options", metavar="KEY=VALUE", multiple=True, help="Of that encoder; repeatable."
    ),
    click.option("--feature-batch", type=Count(1, "batch"), default=64, help="Images in a network at once."),
    click.option("--save-statistics", type=PATH, help="Keep the reference's in this .safetensors."),
    click.option("--no-cache", is_flag=True, help="Neither read nor write cached statistics of the reference."),
)
@sampled_first
def command(samples: tuple[Path, ...], reference: str | None, metrics: list[str] | None, fid_infinity: bool, **options):
    """Measure SAMPLES: a run, a checkpoint (both are sampled first), a folder of images, or an .npz of any project.

    With --reference or --metrics they are measured by FID and the like; metrics.json has all that is needed to repeat
    it. Without, SAMPLES are runs, judged as their recipes say: pictures and scores are kept in RUN/evaluation, and runs
    that differ only in the seed are also summed up as mean and standard deviation. With --epochs-to they tell when they
    reached a score.

    IS is over parts of 5,000 samples as in ADM's script (is-torch-fidelity: 10 parts, shuffled). Precision and recall
    compare with at most 10,000 reference images, k = 3. An ADM reference .npz gives its stored statistics to FID and
    sFID, and its images to the rest.

    An option with [recipe, else ...] overrides that key of the recipe's `sample` section, as in `dic-repa sample`.

    Data sets that come with the package are named: emoji:train, emoji:held-out, digits:train, digits:held-out. A name
    alone stands for the pictures that are trained on, but digits for those held out.

    fd-lite2, prec-lite2 and recall-lite2 judge any pictures without network, by EfficientNet-Lite2, whose weights come
    with the package. fd-encoder, prec-encoder and recall-encoder compare the mean tokens of the encoder that the run
    was aligned to; the teacher judges its pupil. They are no FID and compare with no published number.

    \b
    Examples:
      dic-repa evaluate runs/digits-urepa
      dic-repa evaluate runs/urepa-* runs/baseline-*
      dic-repa evaluate runs/digits-urepa --both              with balanced and with random classes
      dic-repa evaluate runs/baseline runs/urepa --epochs-to 5.0 --metrics fid
      dic-repa evaluate samples/xl --reference VIRTUAL_imagenet256_labeled.npz
      dic-repa evaluate theirs.npz --reference imagenet/val --resize 256 --metrics fid,kid,fd-dinov2 --bootstrap 20
      dic-repa evaluate samples/xl --reference imagenet/train --bound imagenet/val --resize 256 --metrics fdr6
      dic-repa evaluate runs/digits-urepa --reference digits --metrics fd-digits,prec-digits --num 1000
      dic-repa evaluate runs/emoji-urepa --reference emoji:train --bound emoji:held-out --metrics fd-lite2
      dic-repa evaluate runs/mine --reference data/pictures --metrics fd-encoder,prec-encoder,recall-encoder
      accelerate launch -m dic_repa evaluate runs/xl --reference ref.npz --num 50000     on all GPUs of this machine
    """
    if options["both"] and options["drawn_classes"]:
        raise UserError(f"--both and --{options['drawn_classes']}-classes exclude each other; leave one of them out")
    if options["epochs_to"] is not None:
        if reference:
            raise UserError("--epochs-to reads the scores that runs have and measures nothing; leave --reference out")
        show_epochs(options["epochs_to"], samples, metrics)
        return
    if reference is None and metrics is None:
        if options["bound"]:
            raise UserError(
                "--bound goes with --reference; a run that is judged by its recipe has evaluate.bound there"
            )
        several = "runs that are judged already stay judged, and the same command goes on with the others"
        kept = several if len(samples) > 1 and not options["again"] else "nothing was written"
        with when_interrupted(lambda: f"interrupted; {kept}"):
            evaluate_and_show(samples, **options)
        return
    names = dict.fromkeys((metrics or ADM) + (["fid-infinity"] if fid_infinity else []))
    with when_interrupted(lambda: "interrupted; samples that are drawn are kept, and the same command takes them"):
        measure_and_show(samples, reference, list(names), **options)


def _list_metrics(context, _parameter, value) -> None:
    if value:
        from dic_repa.evaluation.metrics import find_metric, metrics

        for name in metrics.names():
            if metric := find_metric(name):  # else a set of metrics
                print_result(f"{name:20} {metric.better:7} is better   {metric.layer}")
            elif name.endswith(":"):
                print_result(f"{name:20} {metrics.describe(name)}")
        context.exit()


def measure_and_show(samples: Sequence[Path], reference: str | None, names: list[str], **options) -> None:
    """Measure each of `samples` against the reference, print a table, and record each."""
    out = options["out"]
    rows = [(path, way) for path in samples for way in ways_to_choose(**options)]
    if out and len(rows) > 1:
        raise UserError("--out names one record, and there are several samples; leave it out")
    for file in filter(None, (out, options["save_statistics"])):
        check_file(file)

    from dic_repa.evaluation import open_images
    from dic_repa.evaluation.judge import by_encoder, notes_on_scores
    from dic_repa.evaluation.runs import is_checkpoint, record, record_file, sample_checkpoint, save_record
    from dic_repa.runs.folder import suggest_runs
    from dic_repa.runtime.processes import start_processes

    opened = {}  # before the reference is read, so that a mistake is shown at once
    for path in samples:
        if not path.exists() and (hint := suggest_runs(path)):
            raise UserError(f"there is nothing to measure at {path}{hint}")
        if not is_checkpoint(path):
            if options["both"]:
                raise UserError(f"--both samples runs and checkpoints, and {path} has its images; leave it out")
            opened[path] = open_images(path, options["resize"])
            check_file(out or record_file(path))
    choose_threads()
    processes = start_processes()
    images_done = partial(progress_bar, unit="image", disable=not processes.is_main_process, leave=False)
    with images_done(desc="reading the reference") as bar:
        measure = load_measure(samples, reference, names, options, processes, bar.update)
    shown = (measure.metrics | measure.ratios).values()
    table = [("samples", "images", "classes", *(metric.title for metric in shown))]
    notes = [note for extractor in measure.extractors.values() for note in extractor.notes]
    written, unwritten = [], ""
    reals: list[tuple[str, ...]] = []  # one row for samples of one number
    chosen = {key: str(value) for key, value in options.items() if value is not None}
    for path, way in rows:
        place = path
        if path not in opened:
            loaded = load_for_sampling(path, processes.device, **{**options, "drawn_classes": way})
            place = sample_checkpoint(path, *loaded, processes, options["again"])
            notes += notes_on_scores(by_encoder(measure.metrics, "lite2"), loaded[0].recipe)
        images = opened.get(path) or open_images(place, options["resize"])
        with print_rank_errors(), images_done(desc=f"measuring {place}", total=len(images)) as bar:
            measured = measure(images, options["bootstrap"] or 0, bar.update)
        if not processes.is_main_process:
            continue
        notes += [*images.notes, *measured.warnings]
        content, file = record(measured, measure, images, reference, chosen, processes), out or record_file(place)
        classes = str(images.made_by.get("sample", {}).get("classes", "unknown"))
        table.append((str(path), str(measured.count), classes, *_cells(measured.values, measured.intervals)))
        if real := measured.real:
            row = (f"real {options['bound']}", str(real.count), "", *_cells(real.values, real.intervals))
            reals += [row] if row not in reals else []
        try:
            save_record(file, content)
            written.append(str(file))
        except OSError as error:
            unwritten = f"{file} cannot be written ({error.strerror}); name another file with --out"
    if processes.is_main_process:
        print_result(format_rows([*table, *reals], left=(0,)))
        for note in dict.fromkeys(notes):
            say(f"note: {note}")
        if written:
            print_result(f"record: {', '.join(written)}")
        if unwritten:
            raise UserError(unwritten)  # now that the scores are shown
    processes.end_training()


def _cells(values: dict, intervals: dict) -> Iterator[str]:
    for name, value in values.items():
        interval = ", ".join(map(number, intervals.get(name, ())))
        yield ("no labels" if value is None else number(value)) + (f" [{interval}]" if interval else "")


def load_measure(samples: Sequence[Path], reference: str | None, names: list[str], options: dict, processes, progress):
    """The `Measure` that the options ask for; the reference's statistics are saved if they say so."""
    from dic_repa.cli.encoders import parse_encoder_options
    from dic_repa.evaluation import Measure
    from dic_repa.evaluation.reference import save_statistics
    from dic_repa.evaluation.runs import encoder_of_runs, real_images_of_runs

    dinov2 = {"weights": options["dinov2_weights"], "encoder": options["dinov2_encoder"]}
    encoder = parse_encoder_options(options["encoder_options"], options["encoder_weights"])
    if encoder and not options["encoder"]:
        raise UserError("--encoder-weights and --encoder-option go with --encoder")
    extractor_options = {
        "inception": {"weights": options["inception_weights"]},
        "dinov2": {key: value for key, value in dinov2.items() if value},
        **_feature_weights(options["feature_weights"]),
        **encoder_of_runs(() if options["encoder"] else samples, names),
    }
    if options["encoder"]:
        extractor_options["encoder"] = {"encoder": options["encoder"], **encoder}
    measure = Measure(
        names,
        real_images_of_runs(samples, reference),
        processes.device,
        bound=real_images_of_runs(samples, options["bound"]),
        extractor_options=extractor_options,
        batch_size=options["feature_batch"],
        resize=options["resize"],
        cache=not options["no_cache"],
        processes=processes,
        progress=progress,
    )
    if options["save_statistics"] and measure.reference and processes.is_main_process:
        save_statistics(measure.reference, options["save_statistics"], measure.extractors)
    return measure


def _feature_weights(options: Sequence[str]) -> dict[str, dict]:
    """The options of extractors from NAME=FILE texts."""
    from dic_repa.evaluation.spaces import SPACES

    parts = [option.partition("=") for option in options]
    for name, _, file in parts:
        if name not in SPACES:
            raise unknown_name("name before = of --feature-weights:", name, SPACES)
        if not file:
            raise UserError(f"--feature-weights takes NAME=FILE, such as {name}={name}.safetensors")
    return {name: {"weights": file} for name, _, file in parts}
