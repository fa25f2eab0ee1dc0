"""`dic-repa bench`: the group; each of its verbs is a module beside this one, imported when it is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path

import click

from dic_repa.cli.groups import Group
from dic_repa.cli.options import Count, option_group
from dic_repa.errors import UserError, first_line, unknown_name
from dic_repa.files.outputs import check_file

VERBS = {
    "model": "The forward pass of denoisers: images per second, share of the device's peak, memory.",
    "train": "Whole training steps: images per second, and where the time goes.",
    "sample": "The whole sampler with guidance and decoding.",
    "paper": "All measurements that compare with the papers' speed, in one go.",
    "data": "How fast the data comes, and the share of a training step spent waiting for it.",
}


class BenchGroup(Group):
    def list_commands(self, _context):
        return list(VERBS)

    def get_command(self, _context, name):
        return import_module(f"dic_repa.cli.bench_{name}").command if name in VERBS else None

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
            formatter.write_dl(list(VERBS.items()))


@click.group("bench", cls=BenchGroup)
def command():
    """Measure speed. What is compared takes turns in one process; numbers are medians with their quartiles.

    \b
    Examples:
      dic-repa bench model DiC-S DiC-B --batch 1,8 --chart speed.png
      dic-repa bench train digits-urepa --compile off,default
      dic-repa bench sample digits-urepa --json
      dic-repa bench data mine.yaml
      dic-repa bench data mine.yaml --set data.workers=8 --json
    """


_COMPARED = option_group(
    "What is compared",
    click.option("--batch", help="Batch sizes, such as 1,32,128.  [default: 1,32 on a GPU, 1,8 on a CPU]"),
    click.option("--precision", help="fp32, tf32, bf16, fp16, or several: bf16,tf32.  [default: fp32]"),
    click.option(
        "--compile",
        "compile_",
        default="off",
        help="off, default, reduce-overhead (CUDA graphs), max-autotune, or several: off,default.",
    ),
    click.option(
        "--baseline",
        multiple=True,
        metavar="[NAME=]FACTORY",
        help="Run beside it what the function file.py:name or module:name makes of all denoisers, or of NAME.",
    ),
)
_TIMING = option_group(
    "How it is measured",
    click.option("--device", help="cpu, cuda or cuda:1.  [default: the GPU where there is one]"),
    click.option("--rounds", type=Count(1), default=7, help="Turns of each case."),
    click.option("--seconds", type=click.FloatRange(0), default=0.3, help="Length of one turn."),
)
_RESULTS = option_group(
    "What is written",
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option(
        "--chart",
        type=click.Path(path_type=Path),
        callback=lambda *given: _png(*given),
        help="A bar chart: a PNG file.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        callback=lambda *given: _free(*given),
        help="Save the result: a JSON file.",
    ),
)


def measuring_options(function: Callable) -> Callable:
    """The options that every measuring verb takes."""
    for options in (_RESULTS, _TIMING, _COMPARED):
        function = options(function)
    return function


def _png(_context, _parameter, path: Path | None) -> Path | None:
    _free(_context, _parameter, path)
    if path and path.suffix.lower() != ".png":  # said now, not when all is measured
        raise UserError(f"--chart saves a PNG file; name it {path.name}.png or so")
    return path


def _free(_context, _parameter, path: Path | None) -> Path | None:
    if path:
        check_file(path)
    return path


def listed(text: str, known: Collection[str] | None = None, kind: str = "") -> list[str]:
    """'a,b' as ['a', 'b']; a UserError for one that is not `known`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if known is not None and name not in known:
            raise unknown_name(kind, name, known)
    return names


def parse_batches(text: str | None, device) -> list[int]:
    """The batch sizes of --batch; a UserError where one is no positive number."""
    names = listed(text or ("1,32" if device.type == "cuda" else "1,8"))
    if not all(name.isdigit() and int(name) for name in names):
        raise UserError(f"--batch takes numbers of images, such as 1,32, not '{text}'")
    return [int(name) for name in names]


def finish(result: dict, as_json: bool, out: Path | None, chart: Path | None, title: str) -> None:
    """Print a measurement as a table or as JSON, and save what was asked for."""
    from dic_repa.bench.report import environment_lines, save_chart, save_json, table

    if out:
        save_json(result, out)
    if chart:
        save_chart(result["rows"], chart, f"{title}, {environment_lines(result['environment'])}")
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(environment_lines(result["environment"]))
    if result.get("after") not in (None, result["environment"]):
        click.echo(f"afterwards: {environment_lines(result['after'])}")
    for precision, peak in result.get("peaks", {}).items():
        click.echo(f"peak, {precision}: {peak['matrix']:.3g} TFLOP/s matrix, {peak['convolution']:.3g} convolution")
    click.echo(table(result["rows"]))
    for line in result.get("notes", []):
        click.echo(line)
    for file in filter(None, (chart, out)):
        click.echo(f"written: {file}")
