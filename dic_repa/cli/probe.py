"""`dic-repa probe`."""

from __future__ import annotations

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.options import PATH, Count, Several
from dic_repa.errors import is_main_process
from dic_repa.files.outputs import check_folder
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.table import format_rows
from dic_repa.runtime.threads import choose_threads


@click.command("probe")
@click.argument("checkpoint", type=PATH, shell_complete=completion.runs)
@click.option(
    "--encoder",
    shell_complete=completion.encoders,
    help="The encoder to compare with.  [default: the encoder of the recipe's first alignment]",
)
@click.option("--num", type=Count(20, "images"), default=1000, help="Images; half train the linear probe.")
@click.option(
    "--times",
    type=Several(click.FloatRange(0, 1)),
    default="0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    help="Noise levels, from 0 (data) to 1 (noise).",
)
@click.option("--taps", type=Several(str), help="Submodules, such as enc.0.1,mid.0.  [default: a few of each stage]")
@click.option("--per-stage", type=Count(1), default=4, help="Taps of each stage at most.")
@click.option("--batch-size", type=Count(1, "batch"), default=64)
@click.option("--out", type=PATH, help="Folder for the results.  [default: RUN/probe]")
def command(checkpoint: Path, out: Path | None, **options):
    """Compare every stage of a denoiser with an encoder: CHECKPOINT is a run's folder or one of its checkpoints.

    Real images are noised to several levels and shown to the averaged weights without their class. For each tap and
    level, on features averaged over positions: linear CKA and CKNNA (10 neighbours) with the encoder's tokens, and a
    linear probe on the labels; and the cosine through the trained head at the taps that were aligned. Writes
    probe.json, heatmaps.png and taps.png; `dic-repa report` shows them.

    \b
    Examples:
      dic-repa probe runs/digits-urepa
      dic-repa probe runs/digits-baseline --encoder digits-vit
      dic-repa probe runs/digits-urepa --times 0.2,0.5,0.8 --taps enc.1.1,mid.0,mid.1,dec.1.0 --num 2000
    """
    if out:
        check_folder(out, "probe")
    if not is_main_process():
        return  # it does not share its work, and two would write the same files

    import torch

    from dic_repa.evaluation.probe import TITLES, probe_checkpoint
    from dic_repa.runtime.progress import progress_bar

    choose_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = options["num"] * len(options["times"])
    with progress_bar(total=total, unit="image", desc="probing", delay=0.1) as bar:
        record, files = probe_checkpoint(checkpoint, out=out, device=device, progress=bar.update, **options)
    print_result(f"best over the noise levels, against {record['encoder']} ({record['num']} {record['split']} images)")
    table = [("", *(TITLES[name] for name in record["scores"]))]
    for i, tap in enumerate(record["taps"]):
        rows = [zip(scores[i], record["times"]) for scores in record["scores"].values()]
        best = [max((cell for cell in row if cell[0] is not None), default=None) for row in rows]
        table.append((tap, *("{:.3f} at t = {:g}".format(*cell) if cell else "" for cell in best)))
    print_result(format_rows(table, left=(0,)))
    print_result(f"the encoder itself: linear probe {record['reference']['linear_probe']:.3f}")
    print_result(f"written: {', '.join(map(str, files))}")
