"""The Python of the README and of every page of docs/ runs: all blocks of a page in their order, in one namespace.

A block that a reader saves to a file (the paragraph before names it, `my_head.py`) is imported from that file instead.
How a page is made small: tests/helpers/page_setups.py.
"""

from __future__ import annotations

import importlib
import re
from contextlib import contextmanager
from pathlib import PurePath

import page_setups
import pytest
from pages import PAGES, blocks, saved_files, write_saved_files

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_every_block_of_python_is_found():
    """None is indented, or of another name."""
    for page, text in PAGES.items():
        assert len(re.findall(r"``` *(?:py|\{)", text)) == len(blocks(page, "python")), page
    assert len(WITH_PYTHON) >= 5


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, plugin_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(plugin_folder)
    write_saved_files(plugin_folder)
    modules = {text: PurePath(name).stem for name, text in saved_files(page).items() if name.endswith(".py")}
    names = {"__name__": page}
    with setup(page, names) as replacements:
        unused = set(replacements)
        for text in blocks(page, "python"):
            if text in modules:
                importlib.import_module(modules[text])
                continue
            unused -= {old for old in unused if old in text}
            for old, new in replacements.items():
                text = text.replace(old, new)
            exec(compile(text, page, "exec"), names)
        assert not unused, "page_setups.py replaces what the page does not say"


@contextmanager
def setup(page: str, names: dict):
    """The page's function of page_setups.py around its blocks."""
    path = PurePath(page)
    name = path.parent.name if page.endswith("/README.md") else path.stem
    steps = getattr(page_setups, name.replace("-", "_").lower(), lambda names: iter([{}]))(names)
    yield next(steps)
    assert next(steps, None) is None
