"""How much is printed besides results, warnings and errors: one level for progress bars, headers and notes.

    set_verbosity("quiet")     neither bars nor notes                            dic-repa ... --quiet
    set_verbosity("normal")    bars and notes
    set_verbosity("verbose")   details too, and what the libraries below log     dic-repa ... --verbose

A result goes to standard output by `print_result`, a warning or an error to standard error, at every level.
"""

import logging
import os
import sys
import warnings
from typing import TextIO

from tqdm import tqdm

from dic_repa.errors import is_main_process, printable, unknown_name

LEVELS = ("quiet", "normal", "verbose")
LIBRARIES = ("accelerate", "timm", "huggingface_hub", "diffusers", "datasets")
_level = "normal"
_widget: type[tqdm] | None = None  # the bar of a notebook; of text where there are no widgets
if "ipykernel" in sys.modules:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # else it tells to install ipywidgets, to whoever imports it first
        from tqdm.auto import tqdm as _best
    _widget = _best


def set_verbosity(level: str) -> None:
    """Print as much as `level`, one of `LEVELS`, says, in this process."""
    global _level
    if level not in LEVELS:
        raise unknown_name("verbosity", level, LEVELS)
    if level == "verbose":
        logging.basicConfig(format="%(name)s: %(message)s")  # to standard error
    if level == "quiet":  # the bars of downloads, read when these libraries are imported
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.INFO if level == "verbose" else logging.NOTSET)
    _level = level


def print_result(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Print a result on standard output, or `file`, at every level of verbosity."""
    print(printable(text), file=file or sys.stdout, end=end, flush=True)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a header or a note, unless quiet: by the main process alone, above a progress bar, on standard error or
    `file`."""
    if _level != "quiet" and is_main_process():
        tqdm.write(printable(text), file=file or sys.stderr)


def detail(text: str) -> None:
    """Print on standard error, if verbose, what helps to find the cause of a problem."""
    if _level == "verbose" and is_main_process():
        tqdm.write(printable(text), file=sys.stderr)


def warn(text: str) -> None:
    """Print a warning on standard error, above a progress bar."""
    tqdm.write(printable(f"warning: {text}"), file=sys.stderr)


def progress_bar(iterable=None, **options) -> tqdm:
    """A `tqdm` bar, unless quiet; where it cannot be redrawn in place, updated every ten seconds at most."""
    if not (sys.stderr.isatty() or _widget):
        options["mininterval"] = 10
    if _level == "quiet":
        options["disable"] = True
    if "desc" in options:
        options["desc"] = printable(options["desc"])
    return (_widget or tqdm)(iterable, dynamic_ncols=True, **options)
