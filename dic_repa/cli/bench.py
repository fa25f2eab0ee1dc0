"""`dic-repa bench`: a group of measurements, and the options that they share."""

import functools
import json
from collections.abc import Callable, Sequence

import click

from dic_repa.cli import completion
from dic_repa.cli.bench_output import check_output, finish
from dic_repa.cli.bench_paper import paper
from dic_repa.cli.bench_poster import poster
from dic_repa.cli.groups import Group
from dic_repa.cli.options import (
    DEVICE,
    PATH,
    ROUNDS,
    Between,
    Command,
    Count,
    Several,
    json_option,
    option_group,
    set_option,
)
from dic_repa.errors import UserError, first_line
from dic_repa.recipe import load_training_recipe
from dic_repa.runtime.progress import print_result


class BenchGroup(Group):
    """A group that says in one line that the GPU's memory is full."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, not imported for `bench --help`
                raise
            raise UserError(
                f"the GPU's memory is full ({first_line(error)}); all that is compared is in memory at once: take "
                "fewer or smaller models, precisions or batches"
            ) from None

    def format_commands(self, _context, formatter):
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=200)) for name, verb in self.commands.items()])


@click.group("bench", cls=BenchGroup)
def command():
    """Measure speed. What is compared runs in turns in one process; results are medians with their quartiles.

    \b
    Examples:
      dic-repa bench model DiC-S DiC-B --batch 1,8 --chart speed.png
      dic-repa bench train digits-urepa --compile off,blocks
      dic-repa bench sample digits-urepa --json
      dic-repa bench data mine.yaml --set data.workers=8
    """


_PRECISIONS = Several(click.Choice(["fp32", "tf32", "bf16", "fp16"]))
_LAYOUTS = Several(click.Choice(["channels_last", "contiguous"]))
_ROOFLINE = click.option(
    "--roofline", is_flag=True, help="Also how far each kind of operation is from this device's limit."
)
_KERNELS = click.option(
    "--kernels",
    type=Several(click.Choice(["auto", "off"])),
    default="auto",
    help="Triton's kernels for DiC's blocks, on a GPU; one or several.",
)
_GUIDANCE = Several(click.Choice(["doubled", "one-by-one"]))


def measuring_options(
    compile_modes: Sequence[str] = ("off", "blocks", "default", "reduce-overhead", "max-autotune"),
    batch: str = "32",
    cpu_batch: str = "8",
) -> Callable:
    """A decorator of a verb that is called with its own options and the `settings` of the measurement, and returns a
    title and the result, which is printed and saved.

    Args:
        compile_modes: What --compile may be.
        batch, cpu_batch: The default of --batch, on a GPU and on a CPU.
    """

    sizes, modes = Several(Count(1, "batch")), Several(click.Choice(compile_modes))

    def decorate(verb: Callable[..., tuple[str, dict]]) -> Callable:
        @option_group(
            "What is compared",
            click.option(
                "--batch", type=sizes, help=f"Batch sizes.  [default: {batch} on a GPU, {cpu_batch} on a CPU]"
            ),
            click.option("--precision", type=_PRECISIONS, default="fp32", help="One or several."),
            click.option("--compile", "modes", type=modes, default="off", help="One or several; blocks: one by one."),
            click.option(
                "--baseline",
                multiple=True,
                metavar="[NAME=]FACTORY",
                help="Also measure what the function file.py:name or module:name makes of each denoiser, or of NAME.",
            ),
        )
        @option_group(
            "How it is measured",
            DEVICE,
            ROUNDS,
            click.option("--seconds", type=Between(0, 3600), default=0.3, help="Length of each measurement, about."),
        )
        @option_group(
            "What is written",
            json_option(),
            click.option("--chart", type=PATH, callback=check_output, help="A bar chart: a PNG file."),
            click.option("--out", type=PATH, callback=check_output, help="Save the result: a JSON file."),
        )
        @functools.wraps(verb)
        def measure(*, device, precision, modes, baseline, rounds, seconds, as_json, chart, out, **options):
            from dic_repa.bench.device import find_device
            from dic_repa.bench.timing import Settings

            found = find_device(device)
            batches = options.pop("batch") or sizes(cpu_batch if found.type == "cpu" else batch)
            settings = Settings(found, precision, modes, batches, baseline, rounds, seconds)
            title, result = verb(settings=settings, **options)
            finish(result, as_json, out, chart, title)

        return measure

    return decorate


@command.command("model", cls=Command)
@click.argument("names", nargs=-1, required=True)
@click.option("--size", type=Count(4, "size"), default=32, help="Height and width of the latent.")
@click.option("--layout", type=_LAYOUTS, default="channels_last", help="Of the weights; one or several.")
@click.option("--no-peak", is_flag=True, help="Do not measure the device's peak.")
@_ROOFLINE
@_KERNELS
@measuring_options(batch="1,32", cpu_batch="1,8")
def model(names, size, layout, no_peak, roofline, kernels, settings):
    """The forward pass of denoisers (presets, or package.module:factory) with random weights, side by side.

    All cases - each denoiser in each precision, layout, compile mode and batch size - take turns in one process; a row
    has the median over the rounds and its quartiles. "To first" is the ratio to the first row of the same batch size.
    "Of matrix peak" and "of conv peak" compare with the best matrix product and 3x3 convolution that this device did
    in the same precision in this run. "Differs by" is the relative error of the output against float32, eager. MB is
    what one call allocates beyond the weights. --roofline adds, by kind of operation, the least time that this device
    needs for it (by the best product, convolution and copy of this run) beside the measured one.

    \b
    Examples:
      dic-repa bench model DiC-S
      dic-repa bench model DiC-S SiT-S/2 --batch 1,8 --compile off,default --chart speed.png
      dic-repa bench model DiC-XL SiT-XL/2 --batch 1,32,128 --precision bf16,tf32 --compile off,default
      dic-repa bench model DiC-S --batch 2 --roofline
      dic-repa bench model DiC-S --baseline tests/helpers/oracle.py:PlainDiC
    """
    from dic_repa.bench.model import bench_model

    settings.kernels = kernels
    return f"forward pass at {size}x{size}", bench_model(names, settings, layout, size, not no_peak, roofline)


@command.command("train", cls=Command)
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@set_option("the recipes")
@_ROOFLINE
@_KERNELS
@measuring_options(("off", "blocks", "default", "reduce-overhead"))
def train(recipes, overrides, roofline, kernels, settings):
    """Whole training steps of recipes, side by side: encoder, denoiser, alignment, backward, optimizer and EMA.

    Data is random and in memory (`bench data` measures the loader), and encoders without a file of weights have random
    ones. Below the table are the shares of a step; on a GPU the encoder runs beside the forward pass. TFLOP/s counts
    the denoiser's forward three times. A --baseline takes the denoiser's place, with torch's plain AdamW and an average
    of the weights written tensor by tensor. All cases are in memory at once, each with its optimizer and averages.

    \b
    Examples:
      dic-repa bench train digits-urepa
      dic-repa bench train dic-xl-urepa sit-xl-2-repa --batch 32 --precision bf16 --compile off,blocks,default
      dic-repa bench train dic-s --set alignments=[] --batch 8 --baseline tests/helpers/oracle.py:PlainDiC
    """
    from dic_repa.bench.train import bench_train

    settings.kernels = kernels
    return "training step", bench_train(recipes, settings, overrides, roofline)


@command.command("sample", cls=Command)
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@set_option("the recipes")
@click.option("--guidance", type=_GUIDANCE, default="doubled", help="Both predictions in one batch, or one by one.")
@measuring_options()
def sample(recipes, overrides, guidance, settings):
    """The whole sampler of training recipes with random weights: all steps, guidance, and decoding to images.

    The solver, its steps and the guidance are those of the recipe's `sample` section. NFE counts the network's
    evaluations for one image. The decoder has random weights if its own are not here.

    \b
    Examples:
      dic-repa bench sample digits-urepa --batch 64
      dic-repa bench sample dic-xl-urepa --set sample.steps=250 --set sample.solver=euler_maruyama \\
        --precision bf16,tf32 --compile off,reduce-overhead --batch 32
    """
    from dic_repa.bench.sample import bench_sample

    if settings.baselines:
        raise click.UsageError("--baseline is for `bench model` and `bench train`")
    return "sampling", bench_sample(recipes, settings, overrides, guidance)


command.add_command(paper)
command.add_command(poster)


@command.command("data")
@click.argument("recipe", shell_complete=completion.recipes)
@set_option()
@click.option("--samples", type=Count(1, "images"), default=2000, help="How many to read.")
@click.option("--steps", type=Count(2, "repeats"), default=20, help="Training steps to time.")
@click.option("--encoded", type=Count(1, "images"), default=64, help="How many to encode.")
@json_option()
def data(recipe: str, overrides: tuple[str, ...], samples: int, encoded: int, steps: int, as_json: bool):
    """Images per second of RECIPE's data, and the share of a training step that is spent waiting for them.

    The samples are written as loose files, as in REPA's layout, and read one at a time; that is what the loader and
    `dic-repa prepare` (on the same images, without and with the recipe's autoencoder) are compared with. Then the
    recipe is trained for some steps; a waiting share above a few percent calls for more data.workers.

    \b
    Examples:
      dic-repa bench data mine.yaml
      dic-repa bench data mine.yaml --set data.workers=8 --json
    """
    from dic_repa.bench.data import bench_data

    result = bench_data(load_training_recipe(recipe, overrides), samples, encoded, steps)
    if as_json:
        print_result(json.dumps(result, indent=2))
        return
    width = max(map(len, result["images_per_second"]))
    for name, speed in result["images_per_second"].items():
        share = result["to_loose_files"][name]
        print_result(f"{name:{width}} {speed:10.0f} images/s   {share:6.2f} of loose files one by one")
    print_result(f"{'training':{width}} {result['training_images_per_second']:10.0f} images/s")
    print_result(f"waiting for data {result['waiting_share']:.1%} of a step, {result['workers']} workers")
