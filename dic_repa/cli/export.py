"""`dic-repa export`."""

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.errors import UserError
from dic_repa.files.outputs import check_folder
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.threads import choose_threads


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["torch", "onnx", "diffusers"]),
    required=True,
    help="A torch.export program (denoiser.pt2), an ONNX file (denoiser.onnx), or a folder that diffusers opens.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    help="Of the weights and of what is computed from them. A program's inputs and output are float32 always.",
)
@click.option("--batch", default="dynamic", help="How many rows a program takes at once: a number, or dynamic for any.")
@click.option(
    "--weights", help="Which weights of a run: ema, another average such as ema-0.999, or raw.  [default: the recipe's]"
)
@click.option(
    "--autoencoder",
    help="For diffusers: where the autoencoder is now, a folder (which is copied) or a hub id.  "
    "[default: where it was in training]",
)
@click.option("--overwrite", is_flag=True, help="Replace what export has written at OUT.")
def command(
    checkpoint: Path,
    out: Path,
    form: str,
    dtype: str,
    batch: str,
    weights: str | None,
    autoencoder: str | None,
    overwrite: bool,
):
    """Write the denoiser of CHECKPOINT to the folder OUT, for another runtime.

    CHECKPOINT is a run's folder, one of its checkpoints, or an inference checkpoint. What is written is compared with
    the model, an ONNX file by onnxruntime, and kept only if it gives the same: in float32 to 1e-4 of the largest
    output, in float16 to 2e-2, in bfloat16 to 1e-1. OUT/export.json says what one must know to sample with it.

    \b
    Examples:
      dic-repa export runs/digits-urepa digits-onnx --format onnx
      dic-repa export runs/digits-urepa digits-onnx-16 --format onnx --dtype float16
      dic-repa export runs/digits-urepa digits-torch --format torch --batch 8
      dic-repa export runs/digits-urepa digits-pipeline --format diffusers
    """
    if check_folder(out, "export") and not overwrite:
        raise UserError(f"{out} exists; pass --overwrite to replace it")
    if batch != "dynamic" and not (batch.isdecimal() and len(batch) < 20):
        raise UserError(f"--batch {batch}: give a number from 1, or dynamic")

    from dic_repa.export.exporting import check_options, export
    from dic_repa.sampling.load import load

    rows: int | str = batch if batch == "dynamic" else int(batch)
    check_options(form, dtype, rows, autoencoder)
    choose_threads()
    made = export(load(checkpoint, weights=weights), out, form, dtype, rows, autoencoder)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print_result(
        f"{made.file}: {dtype}, {size / 1e6:.4g} MB; largest difference from the model {made.difference:.2g}, "
        f"of {made.tolerance:g} allowed"
    )
