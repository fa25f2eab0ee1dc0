"""`dic-repa report`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.options import PATH
from dic_repa.files.outputs import check_file
from dic_repa.runtime.progress import print_result, say


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=PATH, shell_complete=completion.runs)
@click.option("--out", type=PATH, help="The file.  [default: RUN/report.html; of several runs: report.html]")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def command(runs: tuple[Path, ...], out: Path | None, show: bool):
    """Write one self-contained HTML page about RUNS (run folders), side by side.

    Curves, samples over training, metrics, similarity to the encoder (once `dic-repa probe` has been run), the recipes
    with their differences, and the machines. The page needs no network and no other file, so that it can be mailed or
    archived as it is. It also shows runs that are still going on.

    \b
    Examples:
      dic-repa report runs/digits-urepa --open
      dic-repa report runs/digits-baseline runs/digits-urepa --out comparison.html
    """
    if out:
        check_file(out)

    from dic_repa.evaluation.report import write_report

    out = write_report(runs, out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html")))
    print_result(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    if show and not open_in_browser(out):
        say(f"note: no browser could be opened; the page is {out.resolve().as_uri()}")


def open_in_browser(page: Path | str) -> bool:
    """Show the page in the browser, if there is one; what the desktop's opener prints is hidden."""
    if not sys.platform.startswith("linux"):
        return click.launch(str(page)) == 0
    try:
        null = subprocess.DEVNULL
        opener = subprocess.Popen(["xdg-open", page], start_new_session=True, stdin=null, stdout=null, stderr=null)
        return opener.wait(timeout=5) == 0
    except subprocess.TimeoutExpired:
        return True  # it is the browser itself, which stays
    except OSError:
        return False
