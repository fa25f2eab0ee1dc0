"""What MkDocs cannot do by itself for this repository; mkdocs.yml names this file.

- Pages are read on GitHub too. So a file of the site has its path in the repository, and links need no change: the home
  page is README.md, and a page of docs/ links to ../CONTRIBUTING.md and shows ../recipes/results/a.png.
- A script, or another text file, that a page links to is a page with its text.
- api/NAME.md in the navigation is a page that is made: from the docstrings of dic_repa.NAME, or by a function below.
- The reader of docstrings runs no code. It sees the package as it is when installed: with the two folders in it that
  lie beside it here.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocstrings import Inventory

from dic_repa.cli import cli
from dic_repa.cli.parts import find_registries
from dic_repa.registry import first_sentence

ROOT = Path(__file__).parents[2]
BESIDE = ("encoders", "samplers")  # packages in folders of their own, see pyproject.toml
PAGES = ("README.md", "examples/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")  # pages outside docs/
SHOWN = {".py": "python", ".cff": "yaml", ".ipynb": "json"}  # files that a page links to, as pages with their text
_as_installed = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    package = Path(_as_installed.name, "dic_repa")
    if not package.exists():
        package.mkdir()
        for path in [*(ROOT / "dic_repa").iterdir(), *(ROOT / name for name in BESIDE)]:
            (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_as_installed.name]
    return config


@event_priority(100)  # before other plugins look at the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages and what they link to, the style, and the pages that are made."""
    pages = [*PAGES, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]
    linked = sorted({path for page in pages for path in linked_files(page)} - set(pages))
    paths = [*pages, *(path for path in linked if Path(path).suffix not in SHOWN), "docs/site/style.css"]
    found = [file for file in files if file.src_dir != config.docs_dir]  # the theme's
    found += [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    for path in linked:
        if Path(path).suffix in SHOWN:
            in_no_list = InclusionLevel.NOT_IN_NAV
            found.append(File.generated(config, f"{path}.md", content=shown(path), inclusion=in_no_list))
    for name in modules_of(config):
        text = MADE[name](config) if name in MADE else make_module(name, modules_of(config))
        found.append(File.generated(config, f"api/{name}.md", content=text))
    return Files(found)


def shown(path: str) -> str:
    """A text file's text, or the cells of a notebook and what they show."""
    text, suffix = (ROOT / path).read_text(encoding="utf-8"), Path(path).suffix
    if suffix != ".ipynb":
        return f"# {path}\n\n````{SHOWN[suffix]}\n{text}````\n"
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts += [source if cell["cell_type"] == "markdown" else f"````python\n{source}\n````"]
        parts += [shown_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts)


def shown_output(output: dict) -> str:
    data = {kind: "".join(lines) for kind, lines in output.get("data", {}).items()}
    if "text/html" in data:
        return data["text/html"]
    if "image/png" in data:
        return f"![What the cell shows](data:image/png;base64,{''.join(data['image/png'].split())})"
    text = data.get("text/plain", "".join(output.get("text", ())))
    return f"````text\n{text}\n````" if text.strip() else ""


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to text files lead to their pages."""
    return re.sub(rf"(\]\([^)\s:]+(?:{'|'.join(map(re.escape, SHOWN))}))\)", r"\1.md)", markdown)


def linked_files(page: str) -> list[str]:
    links = re.findall(r"\]\(([^)#\s:]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    paths = [((ROOT / page).parent / link).resolve() for link in links]
    return [path.relative_to(ROOT).as_posix() for path in paths if path.is_file()]


def modules_of(config: MkDocsConfig) -> list[str]:
    return re.findall(r"'api/([\w.]+)\.md'", str(config.nav))


def make_index(config: MkDocsConfig) -> str:
    return "::: dic_repa\n" + _table([name for name in modules_of(config) if name not in MADE])


def make_module(name: str, modules: list[str]) -> str:
    options = "    options: {show_if_no_docstring: true}\n" if name == "protocols" else ""
    return f"::: dic_repa.{name}\n{options}" + _table([other for other in modules if other.startswith(f"{name}.")])


def _table(modules: list[str]) -> str:
    summaries = [first_sentence(inspect.getdoc(import_module(f"dic_repa.{name}")) or "") for name in modules]
    rows = [f"| [`dic_repa.{name}`]({name}.md) | {text} |" for name, text in zip(modules, summaries)]
    return "\n".join(["", "## Modules", "", "| module | what is in it |", "|---|---|", *rows] if rows else [])


def make_parts(config: MkDocsConfig) -> str:
    """Every registered part, with the options that a recipe may give it."""
    rows = ["# Parts", "What a recipe can choose, by kind, as `dic-repa parts` lists it; with each part's own options."]
    for slug, registry in find_registries().items():
        where = f"In a recipe: `{registry.key}`. " if registry.key else ""
        what = f"[What one must have][dic_repa.protocols.{registry.protocol}]."
        rows += [f"## {slug}", where + what, "| name | what it is | options |\n|---|---|---|"]
        for name in registry:
            found = registry.find(name) if name[-1] != ":" else None  # a family needs a name behind it
            place = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
            link = f'<autoref optional identifier="{place}"><code>{name}</code></autoref>'
            described = registry.describe(name).replace("|", r"\|")
            rows[-1] += f"\n| {link} | {described} | {_options(found)} |"
    return "\n\n".join(rows)


def make_commands(config: MkDocsConfig) -> str:
    """The help of every verb."""
    rows = ["# Commands", "What `--help` says."]
    for path, command in _verbs(cli, "dic-repa"):
        context = click.Context(command, info_name=path, terminal_width=88, show_default=True)
        level = "##" if path.count(" ") < 2 else "###"
        rows += [f"{level} {path}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(rows)


MADE: dict[str, Callable[[MkDocsConfig], str]] = {"index": make_index, "parts": make_parts, "commands": make_commands}


def _verbs(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from _verbs(command.get_command(click.Context(command), name), f"{path} {name}")


def _options(factory: object) -> str:
    """The arguments with a default of the class or function that makes a part."""
    try:
        parameters = inspect.signature(factory).parameters.values() if callable(factory) else ()
    except ValueError:  # written in C
        return ""
    given = [p for p in parameters if p.default is not p.empty and isinstance(p.default, (int, float, str, tuple))]
    return ", ".join(f"`{p.name}={p.default!r}`" for p in given)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site without every public name."""
    with open(Path(config.site_dir, "objects.inv"), "rb") as file:
        documented = Inventory.parse_sphinx(file)
    if missing := sorted(set(public_names()) - set(documented)):
        raise PluginError(f"not in the reference: {', '.join(missing)}. Give each a docstring, its module a page")


def public_names() -> list[str]:
    """Those in `__all__` of the package and of the packages in it."""
    packages = [path.parent.name for path in (ROOT / "dic_repa").glob("*/__init__.py")]
    modules = ["dic_repa", *(f"dic_repa.{name}" for name in [*packages, *BESIDE])]
    return [f"{module}.{name}" for module in modules for name in getattr(import_module(module), "__all__", ())]
