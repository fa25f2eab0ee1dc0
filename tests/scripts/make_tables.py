"""Write two tables anew: in docs/extending.md the kinds of part and what there is of each, as the registries have them;
in docs/papers.md what we count of each of the papers' denoisers, and what its source counts.

python tests/scripts/make_tables.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from dic_repa.cli.parts import find_registries
from dic_repa.models import Cost, create_denoiser, measure_cost
from dic_repa.models.presets import PRESETS
from dic_repa.registry import Registry

DOCS = Path(__file__).parents[2] / "docs"
PAGE, COUNTS_PAGE = DOCS / "extending.md", DOCS / "papers.md"
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


def with_table(page: str, table: str | None = None) -> str:
    """The text of the page with the table of today, by default that of the kinds of part."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table or make_table()}\n{END}{after}"


def count(name: str) -> dict[int, Cost]:
    """What we count of a preset, by the latent's size, as its source counts it; at 32x32 if that counts no MACs."""
    preset, found = PRESETS[name], {}
    counts = preset.counts
    assert counts is not None
    with torch.device("meta"):
        for size in counts.gmacs or [32]:
            sized = {"size": size} if preset.kind == "UViT" else {}  # its positions are learnt for one size
            data = {"in_channels": 4, "num_classes": 1000}
            found[size] = measure_cost(create_denoiser(name, **{**data, **counts.options, **sized}), size)
    return found


def count_row(name: str, costs: dict[int, Cost]) -> str:
    """A preset's line: our counts, and behind them in brackets what its source has."""
    counts = PRESETS[name].counts
    assert counts is not None

    def cell(ours: float, theirs: float | None, beside: float) -> str:
        alike = f"; {ours + beside:.2f}" if theirs and beside else ""
        return f"{ours:.2f}{alike}" + (f" ({theirs:g})" if theirs else "")

    parameters, macs = counts.beside
    cells = [cell(next(iter(costs.values())).parameters / 1e6, counts.parameters, parameters)]
    cells += [cell(costs[s].macs / 1e9, counts.gmacs.get(s), macs) if s in costs else "" for s in (32, 64)]
    return f"| {name} | {' | '.join(cells)} | {counts.source} |"


def make_counts() -> str:
    rows = ["| | parameters (M) | GMACs at 32x32 | at 64x64 | source |", "|---|---|---|---|---|"]
    rows += [count_row(name, count(name)) for name, preset in PRESETS.items() if preset.counts]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    COUNTS_PAGE.write_text(with_table(COUNTS_PAGE.read_text(encoding="utf-8"), make_counts()), encoding="utf-8")
