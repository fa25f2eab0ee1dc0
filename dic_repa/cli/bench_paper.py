"""`dic-repa bench paper`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from dic_repa.cli.bench import finish, listed
from dic_repa.cli.options import Count
from dic_repa.errors import is_main_process
from dic_repa.files.outputs import begin_folder, check_folder


@click.command("paper")
@click.option("--out", type=click.Path(path_type=Path), default="bench", help="Folder for results.")
@click.option("--small", is_flag=True, help="The same measurements with small models: minutes on a CPU.")
@click.option("--device", help="cpu, cuda or cuda:1.  [default: the GPU where there is one]")
@click.option("--baseline", default="tests/helpers/oracle.py:PlainDiC", help="The plain DiC to compare with.")
@click.option("--only", default="forward,train,sample", help="Which parts to measure.")
@click.option("--precision", help="Which precisions.  [default: bf16,tf32; with --small bf16,fp32]")
@click.option("--rounds", type=Count(1), default=7, help="How often each case is measured.")
def command(out: Path, small: bool, device: str | None, baseline: str, only: str, precision: str | None, rounds: int):
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
