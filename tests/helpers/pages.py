"""The README, that of the examples and the pages of docs/, and their code blocks."""

from __future__ import annotations

import re
from pathlib import Path

from places import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in CODE.findall(PAGES[page]) if kind == language]


def saved_files(page: str) -> dict[str, str]:
    """The files that a reader is told to save: their names stand in the paragraph before the block."""
    files = {}
    for match in CODE.finditer(PAGES[page]):
        paragraph = PAGES[page][: match.start()].rstrip().rpartition("\n\n")[2]
        names = re.findall(r"`([\w-]+\.(?:py|yaml))`", paragraph)
        if match[1] in ("python", "yaml") and names:
            assert names[-1] not in files
            files[names[-1]] = match[2]
    return files


def write_saved_files(folder: Path, *names: str) -> None:
    """Those of all pages, or those with these names."""
    files = [item for page in PAGES for item in saved_files(page).items()]
    assert len(dict(files)) == len(files), "two pages use one name for a file"
    for name, text in files:
        if not names or name in names:
            (folder / name).write_text(text, encoding="utf-8")
