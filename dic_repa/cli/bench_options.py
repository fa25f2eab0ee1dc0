"""What the verbs of `dic-repa bench` share: their options, and how a result is shown and saved."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from pathlib import Path

import click

from dic_repa.cli.options import Count, json_option, option_group
from dic_repa.errors import UserError, unknown_name
from dic_repa.files.outputs import check_file

device_option = click.option("--device", help="cpu, cuda or cuda:1.  [default: the GPU where there is one]")
rounds_option = click.option("--rounds", type=Count(1), default=7, help="How often each case is measured.")
_COMPARED = (
    click.option("--precision", default="fp32", help="fp32, tf32, bf16, fp16, or several: bf16,tf32."),
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
        help="Also measure what the function file.py:name or module:name makes of each denoiser, or of NAME.",
    ),
)
_TIMING = option_group(
    "How it is measured",
    device_option,
    rounds_option,
    click.option(
        "--seconds",
        type=click.FloatRange(0),
        default=0.3,
        help="About how long each measurement lasts; one call at least.",
    ),
)


def _check(_context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written now, not when all is measured."""
    if path:
        check_file(path)
        if option.name == "chart" and path.suffix.lower() != ".png":
            raise UserError(f"--chart saves a PNG file; name it {path.name}.png or so")
    return path


_PATH = click.Path(path_type=Path)
_RESULTS = option_group(
    "What is written",
    json_option(),
    click.option("--chart", type=_PATH, callback=_check, help="A bar chart: a PNG file."),
    click.option("--out", type=_PATH, callback=_check, help="Save the result: a JSON file."),
)


def measuring_options(modes: Collection[str] = (), batch: tuple[str, str] = ("1,32", "1,8")) -> Callable:
    """A decorator that gives a measuring verb the options that all of them take.

    Args:
        modes: What --compile may be; by default all modes of `torch.compile`.
        batch: The batch sizes where none are given, on a GPU and on a CPU.

    The verb is called with its own options and `device`, `precisions`, `compiles`, `batches`, `baselines`, `rounds` and
    `seconds`; it returns a title and the result, which is printed and saved.
    """

    def decorate(verb: Callable[..., tuple[str, dict]]) -> Callable:
        @functools.wraps(verb)
        def measure(*, device, precision, compile_, baseline, as_json, chart, out, **options):
            from dic_repa.bench.device import find_device
            from dic_repa.models.compiled import COMPILE_MODES

            found = find_device(device)
            title, result = verb(
                device=found,
                precisions=listed(precision),
                compiles=listed(compile_, modes or COMPILE_MODES, "compile mode" + " of training" * bool(modes)),
                batches=_parse_batches(options.pop("batch") or batch[found.type == "cpu"]),
                baselines=baseline,
                **options,
            )
            finish(result, as_json, out, chart, title)

        batch_text = f"Batch sizes, such as 1,32,128.  [default: {batch[0]} on a GPU, {batch[1]} on a CPU]"
        compared = option_group("What is compared", click.option("--batch", help=batch_text), *_COMPARED)
        return compared(_TIMING(_RESULTS(measure)))

    return decorate


def listed(text: str, known: Collection[str] | None = None, kind: str = "") -> list[str]:
    """'a,b' as ['a', 'b']; a UserError for one that is not `known`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if known is not None and name not in known:
            raise unknown_name(kind, name, known)
    return names


def _parse_batches(text: str) -> list[int]:
    names = listed(text)
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
