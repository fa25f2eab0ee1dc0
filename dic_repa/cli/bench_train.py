"""`dic-repa bench train`."""

from __future__ import annotations

import click

from dic_repa.cli import completion
from dic_repa.cli.bench import finish, listed, measuring_options, parse_batches
from dic_repa.cli.options import Command


@click.command("train", cls=Command)
@click.argument("recipes", nargs=-1, required=True, shell_complete=completion.recipes)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipes; repeatable."
)
@measuring_options
def command(recipes, overrides, batch, precision, compile_, baseline, device, rounds, seconds, as_json, chart, out):
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
    from dic_repa.bench.device import find_device
    from dic_repa.bench.train import bench_train

    device = find_device(device)
    result = bench_train(
        recipes,
        device,
        overrides,
        precisions=listed(precision or "fp32"),
        compiles=listed(compile_, ("off", "default"), "compile mode of training"),
        batches=parse_batches(batch or ("32" if device.type == "cuda" else "8"), device),
        baselines=baseline,
        rounds=rounds,
        seconds=seconds,
    )
    finish(result, as_json, out, chart, "training step")
