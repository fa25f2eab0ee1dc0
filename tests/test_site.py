"""The documentation site, as `mkdocs build --strict` makes it: public names, no request to another host, a search."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from threading import Thread

import pytest
from browser import Browser
from pages import PAGES, blocks
from places import ROOT
from report_runs import needs_browser

import dic_repa

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Strictly built: a link that leads nowhere, a page outside the navigation, or a wrong docstring is an error."""
    folder = tmp_path_factory.mktemp("site")
    # A process of its own: the parts that tests have registered in this one are not the package's.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def documented(site) -> set[str]:
    from mkdocstrings import Inventory

    with open(site / "objects.inv", "rb") as file:
        return set(Inventory.parse_sphinx(file))


def test_every_public_name_is_in_the_reference(documented):
    names = [f"dic_repa.{name}" for name in dic_repa.__all__]
    for found in walk_packages(dic_repa.__path__, "dic_repa."):
        if found.ispkg:
            names += [f"{found.name}.{name}" for name in getattr(import_module(found.name), "__all__", ())]
    for package in ("encoders", "samplers"):
        names += [f"dic_repa.{package}.{name}" for name in import_module(f"dic_repa.{package}").__all__]
    assert len(names) > 100
    assert not sorted(set(names) - documented)


def test_what_examples_import_is_in_the_reference(documented):
    code = "\n".join(text for page in PAGES for text in blocks(page, "python"))
    code += "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py"))
    imports = re.findall(r"^\s*from (dic_repa[\w.]*) import (?:\(([^)]*)\)|(.+))$", code, flags=re.MULTILINE)
    names = {f"{module}.{name}" for module, *lists in imports for name in re.findall(r"\w+", " ".join(lists))}
    assert len(names) > 15
    assert not sorted(names - documented)


class Loaded(HTMLParser):
    """What a page makes the browser fetch."""

    def __init__(self, page: Path):
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        self.found += [given[key] for key in ("src", "srcset", "data") if given.get(key)]
        self.found += [given["href"]] if tag == "link" else []


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded(page).found
        assert len(loaded) > 3
        for place in loaded:
            if place.startswith("data:image/"):  # within the page
                continue
            assert not re.match(r"[a-z]+:|//", place), f"{page}: {place}"
            if page.name != "404.html":  # its places begin at the root
                assert (page.parent / place).resolve().is_file(), f"{page}: {place}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:|//)", sheet.read_text(encoding="utf-8")), sheet


@pytest.fixture
def address(site):
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@needs_browser
def test_in_a_browser(address, tmp_path):
    """A search, the dark palette and a phone's width; nothing is asked of another host."""
    with Browser(tmp_path, width=390) as browser:
        browser.open(address + "docs/guide.html?q=sample_ode")
        links = "[...document.querySelectorAll('.md-search-result__link')]"
        browser.wait_for(f"{links}.length")
        found = browser.run(f"{links}.map(link => link.href).join()")
        assert "api/samplers.html" in found
        assert "docs/sampling.html" in found
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.run("document.querySelector('label[for=__palette_1]').click()")
        browser.wait_for("document.body.dataset.mdColorScheme == 'slate'")
        assert all(place.startswith((address, "data:")) for place in browser.requests)
        assert len(browser.requests) > 3
        assert not browser.console
