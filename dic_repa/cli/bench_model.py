"""`dic-repa bench model`."""

from __future__ import annotations

import click

from dic_repa.cli.bench import listed, measuring_options
from dic_repa.cli.options import Command, Count


@click.command("model", cls=Command)
@click.argument("names", nargs=-1, required=True)
@click.option("--size", type=Count(4), default=32, help="Height and width of the latent.")
@click.option("--layout", default="channels_last", help="channels_last, contiguous: of the weights.")
@click.option("--no-peak", is_flag=True, help="Do not measure the device's peak.")
@measuring_options()
def command(names, size, layout, no_peak, **measuring):
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
