"""`dic-repa bench`: a group of measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.bench_options import device_option, finish, listed, measuring_options, rounds_option
from dic_repa.cli.groups import Group
from dic_repa.cli.options import Command, Count, json_option, set_option
from dic_repa.errors import UserError, first_line, is_main_process
from dic_repa.files.outputs import begin_folder, check_folder
from dic_repa.recipe import load_training_recipe


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
            formatter.write_dl([(name, verb.short_help) for name, verb in self.commands.items()])


@click.group("bench", cls=BenchGroup)
def command():
    """Measure speed. What is compared runs in turns in one process; results are medians with their quartiles.

    \b
    Examples:
      dic-repa bench model DiC-S DiC-B --batch 1,8 --chart speed.png
      dic-repa bench train digits-urepa --compile off,default
      dic-repa bench sample digits-urepa --json
      dic-repa bench data mine.yaml
      dic-repa bench data mine.yaml --set data.workers=8 --json
    """


@command.command(
    "model",
    cls=Command,
    short_help="The forward pass of denoisers: speed, share of the device's peak, memory.",
)
@click.argument("names", nargs=-1, required=True)
@click.option("--size", type=Count(4), default=32, help="Height and width of the latent.")
@click.option("--layout", default="channels_last", help="channels_last, contiguous: of the weights.")
@click.option("--no-peak", is_flag=True, help="Do not measure the device's peak.")
@measuring_options()
def model(names, size, layout, no_peak, **measuring):
    """The forward pass of denoisers (presets, or package.module:factory) with random weights, side by side.

    All cases - each denoiser in each precision, layout, compile mode and batch size - take turns in one process; a row
    has the median over the rounds and its quartiles. "To first" is the ratio to the first row of the same batch size.
    "Of matrix peak" and "of conv peak" compare with the best matrix product and 3x3 convolution that this device did
    in the same precision in this run. "Differs by" is the relative error of the output against float32, eager. MB is
    what one call allocates beyond the weights.

    \b
    Examples:
      dic-repa bench model DiC-S
      dic-repa bench model DiC-S SiT-S/2 --batch 1,8 --compile off,default --chart speed.png
      dic-repa bench model DiC-XL SiT-XL/2 --batch 1,32,128 --precision bf16,tf32 --compile off,default
      dic-repa bench model DiC-S --baseline tests/helpers/oracle.py:PlainDiC
    """
    from dic_repa.bench.model import LAYOUTS, bench_model

    layouts = listed(layout, LAYOUTS, "layout")
    result = bench_model(names, layouts=layouts, size=size, peaks=not no_peak, **measuring)
    return f"forward pass at {size}x{size}", result


@command.command("train", cls=Command, short_help="Whole training steps: images per second, and where the time goes.")
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@set_option("the recipes")
@measuring_options(modes=("off", "default"), batch=("32", "8"))
def train(recipes, overrides, **measuring):
    """Whole training steps of recipes, side by side: encoder, denoiser, alignment, backward, optimizer and EMA.

    Data is random and in memory (`bench data` measures the loader), and encoders without a file of weights have random
    ones. Below the table are the shares of a step; on a GPU the encoder runs beside the forward pass. TFLOP/s counts
    the denoiser's forward three times. A --baseline takes the denoiser's place, with torch's plain AdamW and an average
    of the weights written tensor by tensor. All cases are in memory at once, each with its optimizer and averages.

    \b
    Examples:
      dic-repa bench train digits-urepa
      dic-repa bench train dic-xl-urepa sit-xl-2-repa --batch 32 --precision bf16 --compile off,default
      dic-repa bench train dic-s --set alignments=[] --batch 8 --baseline tests/helpers/oracle.py:PlainDiC
    """
    from dic_repa.bench.train import bench_train

    return "training step", bench_train(recipes, overrides=overrides, **measuring)


@command.command("sample", cls=Command, short_help="The whole sampler with guidance and decoding.")
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@set_option("the recipes")
@click.option("--guidance", default="doubled", help="doubled (batch), one-by-one, or both: doubled,one-by-one.")
@measuring_options(batch=("32", "8"))
def sample(recipes, overrides, guidance, baselines, **measuring):
    """The whole sampler of training recipes with random weights: all steps, guidance, and decoding to images.

    The solver, its steps and the guidance are those of the recipe's `sample` section. NFE counts the network's
    evaluations for one image. The decoder has random weights if its own are not here.

    \b
    Examples:
      dic-repa bench sample digits-urepa --batch 64
      dic-repa bench sample dic-xl-urepa --set sample.steps=250 --set sample.solver=euler_maruyama \\
        --precision bf16,tf32 --compile off,reduce-overhead --batch 32
    """
    from dic_repa.bench.sample import GUIDANCE, bench_sample

    if baselines:
        raise click.UsageError("--baseline is for `bench model` and `bench train`")
    ways = listed(guidance, GUIDANCE, "way of guidance")
    return "sampling", bench_sample(recipes, overrides=overrides, guidance=ways, **measuring)


@command.command("paper", short_help="All measurements that compare with the papers' speed, in one go.")
@click.option("--out", type=click.Path(path_type=Path), default="bench", help="Folder for results.")
@click.option("--small", is_flag=True, help="The same measurements with small models: minutes on a CPU.")
@device_option
@click.option("--baseline", default="tests/helpers/oracle.py:PlainDiC", help="The plain DiC to compare with.")
@click.option("--only", default="forward,train,sample", help="Which parts to measure.")
@click.option("--precision", help="Which precisions.  [default: bf16,tf32; with --small bf16,fp32]")
@rounds_option
def paper(out: Path, small: bool, device: str | None, baseline: str, only: str, precision: str | None, rounds: int):
    """Everything that compares with the papers' speed, in one go; a JSON file and a bar chart for each part in each
    precision, written as soon as it is measured, so that a GPU lent for minutes can do one at a time.

    DiC-XL and SiT-XL/2 at 32x32, batches 1, 32 and 128, in bf16 and TF32, compiled and eager, and a plain DiC beside
    them; a training step with DINOv2-B; and guided sampling in 250 steps. Run from a clone of the repository, whose
    tests/ hold the plain DiC.

    \b
    Examples:
      dic-repa bench paper                    on a GPU of 80 GB
      dic-repa bench paper --only forward --precision bf16
      dic-repa bench paper --small            on a CPU
    """
    there = bool(check_folder(out, "measurements"))

    from dic_repa.bench.device import find_device
    from dic_repa.bench.paper import FULL, PARTS, SMALL, measure_paper

    found, plan = find_device(device), SMALL if small else FULL
    if precision:
        plan = replace(plan, precisions=tuple(listed(precision, plan.precisions, "precision")))
    for name, result in measure_paper(found, small, baseline, rounds, plan, listed(only, PARTS, "part")):
        if is_main_process():
            if not there:
                begin_folder(out, "measurements")
                there = True
            click.echo(f"\n{name}")
            finish(result, False, out / f"{name}.json", out / f"{name}.png", name)
    click.echo(f"\nsaved: {out}")


@command.command("data", short_help="How fast the data comes, and the share of a training step spent waiting for it.")
@click.argument("recipe", shell_complete=completion.recipes)
@set_option()
@click.option("--samples", type=Count(1), default=2000, help="How many to read.")
@click.option("--steps", type=Count(2), default=20, help="Training steps to time.")
@click.option("--encoded", type=Count(1), default=64, help="How many to encode.")
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
    click.echo(json.dumps(result, indent=2) if as_json else _table(result))


def _table(result: dict) -> str:
    width = max(map(len, result["images_per_second"]))
    lines = [
        f"{name:{width}} {speed:10.0f} images/s   {result['to_loose_files'][name]:6.2f} of loose files one by one"
        for name, speed in result["images_per_second"].items()
    ]
    lines.append(f"{'training':{width}} {result['training_images_per_second']:10.0f} images/s")
    return "\n".join([*lines, f"waiting for data {result['waiting_share']:.1%} of a step, {result['workers']} workers"])
