"""`dic-repa bench paper`."""

import json
from pathlib import Path

import click

from dic_repa.cli.options import DEVICE, PATH, ROUNDS, Between, Several
from dic_repa.errors import UserError, is_main_process
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK, begin_folder, check_folder
from dic_repa.runtime.progress import print_result

_OF_PAPER = Several(click.Choice(["bf16", "tf32", "fp32"]))
_PARTS = Several(click.Choice(["ceilings", "check", "forward", "train", "flags", "one", "sample", "whole"]))


@click.command("paper")
@click.option("--out", type=PATH, default="bench", help="Folder for results.")
@click.option("--small", is_flag=True, help="The same measurements with small models: minutes on a CPU.")
@DEVICE
@click.option("--baseline", default="tests/helpers/oracle.py:PlainDiC", help="The plain DiC to compare with.")
@click.option("--only", type=_PARTS, help="Which parts to measure, whatever their order.  [default: all eight]")
@click.option("--precision", type=_OF_PAPER, help="Which precisions.  [default: bf16,tf32; with --small bf16]")
@click.option(
    "--budget",
    type=Between(0, 1e6),
    default=540,
    help="Seconds, after which nothing more is begun; 0: no limit.",
)
@ROUNDS
def paper(out: Path, small: bool, device: str | None, baseline: str, only, precision, budget: float, rounds: int):
    """All measurements that compare with the papers' speed, in one go: the most important first, in ten minutes.

    In this order: the device's limits (copy, matrix products, DiC's 3x3 convolutions); outputs against float32, eager;
    the forward pass of DiC-XL at batches 32 and 128, with a plain DiC and SiT-XL/2 beside it; training steps with
    DINOv2-B; torch's own flags for TF32; batch 1 with CUDA graphs; guided sampling in 250 steps; all compiled as one
    graph. Then the same in the next precision. Each case is measured by itself, printed and saved at once; what fails,
    or does not fit into the budget any more, has a row that says so. Run from a clone of the repository, whose tests/
    hold the plain DiC.

    \b
    Examples:
      dic-repa bench paper                    on a GPU of 80 GB
      dic-repa bench paper --only forward,train --precision bf16 --budget 300
      dic-repa bench paper --small            on a CPU
    """
    check_folder(out, "measurements")

    from dic_repa.bench.budget import Budget
    from dic_repa.bench.device import describe_device, find_device
    from dic_repa.bench.paper import FULL, PARTS, SMALL, measure_paper
    from dic_repa.bench.timing import add_ratios, save_chart, table

    found = find_device(device)
    if found.type != "cuda" and not small:
        raise UserError("models of full size need a GPU; take --small, which runs on a CPU")
    precisions = precision or (["bf16"] if small else ["bf16", "tf32"])
    plan = SMALL if small else FULL
    for name, rows in measure_paper(found, plan, only or PARTS, precisions, baseline, rounds, Budget(budget)):
        print_result(f"\n{name}")
        result: dict = {"environment": describe_device(found), "rows": []}
        for row in rows:
            result["rows"].append(row)
            timed = [row for row in result["rows"] if "images_per_second" in row]
            add_ratios(timed)
            if is_main_process():
                if not check_folder(out, "measurements"):
                    begin_folder(out, "measurements")
                write_whole(out / f"{name}.json", json.dumps({"made_by": MARK, **result}, indent=2) + "\n")
                print_result(_line(row))
        if is_main_process() and timed:
            print_result("\n" + table(result["rows"]))
            here = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
            save_chart(timed, out / f"{name}.png", f"{name}, {here}")
    print_result(f"\nsaved: {out}")


def _line(row: dict) -> str:
    """A row in one line, as soon as it is there."""
    units = {
        "images_per_second": "{:.4g} images/s",
        "tflops": "{:.3g} TFLOP/s",
        "searched_tflops": "{:.3g} with cuDNN's benchmark mode",
        "gb_per_second": "{:.4g} GB/s",
        "difference": "differs by {:.1e}",
        "failed": "{}",
    }
    found = ", ".join(form.format(row[key]) for key, form in units.items() if key in row)
    return f"{row['label']}, batch {row['batch']}: {found}"
