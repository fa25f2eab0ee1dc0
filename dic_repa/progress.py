"""Progress bars that leave few lines in a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(iterable=None, **options) -> tqdm:
    """A `tqdm` bar; where standard error is no terminal, a new state every ten seconds at most."""
    if not sys.stderr.isatty():
        options["mininterval"] = 10
    return tqdm(iterable, dynamic_ncols=True, **options)
