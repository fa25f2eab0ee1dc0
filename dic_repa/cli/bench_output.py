"""What `dic-repa bench` prints and saves."""

import json
from pathlib import Path

import click

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK, check_file
from dic_repa.runtime.progress import print_result


def check_output(_context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written now, not when all is measured."""
    if path:
        check_file(path)
        if option.name == "chart" and path.suffix.lower() != ".png":
            raise UserError(f"--chart saves a PNG file; name it {path.name}.png or so")
    return path


def finish(result: dict, as_json: bool, out: Path | None, chart: Path | None, title: str) -> None:
    """Print a measurement as a table or as JSON, and save what was asked for."""
    from dic_repa.bench import roofline
    from dic_repa.bench.timing import save_chart, table

    here, after = (
        ", ".join(f"{key} {value}" for key, value in result.get(when, {}).items()) for when in ("environment", "after")
    )
    if out:
        write_whole(out, json.dumps({"made_by": MARK, **result}, indent=2) + "\n")
    if chart:
        save_chart(result["rows"], chart, f"{title}, {here}")
    if as_json:
        print_result(json.dumps(result, indent=2))
        return
    print_result(here)
    if after not in ("", here):
        print_result(f"afterwards: {after}")
    for precision, peak in result.get("peaks", {}).items():
        print_result(f"peak, {precision}: {peak['matrix']:.3g} TFLOP/s matrix, {peak['convolution']:.3g} convolution")
    print_result("\n".join([table(result["rows"]), *result.get("notes", [])]))
    for label, found in result.get("rooflines", {}).items():
        print_result(f"\n{label}\n{table(found['rows'], roofline.COLUMNS)}\n{found['words']}")
    for file in filter(None, (chart, out)):
        print_result(f"written: {file}")
