"""`dic-repa bench sample`."""

from __future__ import annotations

import click

from dic_repa.cli import completion
from dic_repa.cli.bench import finish, listed, measuring_options, parse_batches
from dic_repa.cli.options import Command


@click.command("sample", cls=Command)
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipes; repeatable."
)
@click.option("--guidance", default="doubled", help="doubled (batch), one-by-one, or both: doubled,one-by-one.")
@measuring_options
def command(
    recipes, overrides, guidance, batch, precision, compile_, baseline, device, rounds, seconds, as_json, chart, out
):
    """The whole sampler of training recipes with random weights: all steps, guidance, and decoding to images.

    The solver, its steps and the guidance are those of the recipe's `sample` section. NFE counts the network's
    evaluations for one image. The decoder has random weights where its own cannot be had.

    \b
    Examples:
      dic-repa bench sample digits-urepa --batch 64
      dic-repa bench sample dic-xl-urepa --set sample.steps=250 --set sample.solver=euler_maruyama \\
        --precision bf16,tf32 --compile off,reduce-overhead --batch 32
    """
    from dic_repa.bench.device import find_device
    from dic_repa.bench.sample import GUIDANCE, bench_sample
    from dic_repa.models.compiled import COMPILE_MODES

    if baseline:
        raise click.UsageError("--baseline is for `bench model` and `bench train`")
    device = find_device(device)
    result = bench_sample(
        recipes,
        device,
        overrides,
        precisions=listed(precision or "fp32"),
        compiles=listed(compile_, COMPILE_MODES, "compile mode"),
        guidance=listed(guidance, GUIDANCE, "way of guidance"),
        batches=parse_batches(batch or ("32" if device.type == "cuda" else "8"), device),
        rounds=rounds,
        seconds=seconds,
    )
    finish(result, as_json, out, chart, "sampling")
