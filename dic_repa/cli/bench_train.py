"""`dic-repa bench train`."""

from __future__ import annotations

import click

from dic_repa.cli import completion
from dic_repa.cli.bench import measuring_options, set_option
from dic_repa.cli.options import Command


@click.command("train", cls=Command)
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@set_option
@measuring_options(modes=("off", "default"), batch=("32", "8"))
def command(recipes, overrides, **measuring):
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
