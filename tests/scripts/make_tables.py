"""Write the table of docs/extending.md anew: the kinds of part and what there is of each, as the registries have them.

python tests/scripts/make_tables.py
"""

from __future__ import annotations

from pathlib import Path

from dic_repa.cli.parts import find_registries
from dic_repa.registry import Registry

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BEGIN, END = "<!-- made by tests/scripts/make_tables.py -->\n", "<!-- end -->\n"
LISTED = {
    "denoiser": "`dic-repa info`",
    "encoder": "`dic-repa encoders`",
    "autoencoder": "`dic-repa autoencoders`",
    "metric": "[metrics.md](metrics.md)",
}


def make_table() -> str:
    """A row for each kind: where a recipe names it, its protocol, the group of its entry points, what there is."""
    rows = ["| kind | in a recipe | protocol | entry points | there are |", "|---|---|---|---|---|"]
    for slug, registry in find_registries().items():
        names = LISTED.get(slug) or ", ".join(f"`{name}`" for name in registry if _is_ours(registry, name))
        key = f"`{registry.key}`" if registry.key else ""
        rows.append(f"| {registry.kind} | {key} | `{registry.protocol}` | `{registry.group}` | {names} |")
    return "\n".join(rows) + "\n"


def _is_ours(registry: Registry, name: str) -> bool:
    found = registry.find(name)
    return getattr(found, "func", found).__module__.startswith("dic_repa.")  # of a partial, what it calls


def with_table(page: str) -> str:
    """The text of the page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{make_table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
