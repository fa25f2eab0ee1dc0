"""`dic-repa bench sample`."""

from __future__ import annotations

import click

from dic_repa.cli import completion
from dic_repa.cli.bench import listed, measuring_options, set_option
from dic_repa.cli.options import Command


@click.command("sample", cls=Command)
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@set_option
@click.option("--guidance", default="doubled", help="doubled (batch), one-by-one, or both: doubled,one-by-one.")
@measuring_options(batch=("32", "8"))
def command(recipes, overrides, guidance, baselines, **measuring):
    """The whole sampler of training recipes with random weights: all steps, guidance, and decoding to images.

    The solver, its steps and the guidance are those of the recipe's `sample` section. NFE counts the network's
    evaluations for one image. The decoder has random weights where its own cannot be had.

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
