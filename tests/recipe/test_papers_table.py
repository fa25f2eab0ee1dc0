"""The table of docs/papers.md: what each row's source publishes and how, against what the recipe does."""

from __future__ import annotations

import pytest
from places import ROOT

from dic_repa.recipe import Recipe, list_recipes, load_recipe

PAGE = ROOT / "docs/papers.md"
PROTOCOL = ("classes", "guidance", "channels", "solver", "flips", "clipping")
RECIPES = {name: load_recipe(name) for name in list_recipes()}
ROWS = {
    name: recipe
    for name, recipe in RECIPES.items()
    if isinstance(recipe, Recipe) and recipe.paper and not recipe.paper.row.endswith("in no paper")
}


def read_table() -> dict[str, dict[str, str]]:
    """The cells of each recipe's line, by the column's heading."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| recipe | published |"))
    headings, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:] if line.startswith("|")
    )
    table = {}
    for cells in rows:
        if not cells[0].startswith("`") or len(cells) != len(headings):
            break
        table[cells[0].strip("`")] = dict(zip(headings, cells))
    return table


TABLE = read_table()


def protocol(recipe: Recipe) -> dict[str, str]:
    sample, guidance = recipe.sample, recipe.sample.guidance
    low, high = guidance.interval if guidance else (0, 0)
    return {
        "classes": sample.classes,
        "guidance": f"{guidance.scale:g} on [{low:g}, {high:g}]" if guidance else "none",
        "channels": str(guidance.channels or "all") if guidance else "–",
        "solver": f"{sample.solver} {sample.steps}",
        "flips": "yes" if recipe.data.options["flip"] else "no",
        "clipping": "none" if recipe.train.gradient_clip is None else f"{recipe.train.gradient_clip:g}",
    }


def published(recipe: Recipe) -> str:
    def numbers(values: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in values.items() if name.startswith(("FID", "IS")))

    own = numbers(recipe.paper.results)
    others = [f"{network}: {numbers(values)}" for network, values in recipe.paper.elsewhere.items()]
    return "; ".join([own or "no number", *others])


def test_each_row_is_in_the_table_once():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert set(TABLE) == set(ROWS)
    for name in ROWS:
        assert sum(line.startswith(f"| `{name}` |") and line.count("|") == 11 for line in lines) == 1


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_does_what_its_line_says(name):
    line, ours = TABLE[name], protocol(ROWS[name])
    assert line["published"] == published(ROWS[name])
    # What the source states the recipe does, or `ours` says what it does instead; nothing else is there.
    instead = [f"{column} {ours[column]}" for column in PROTOCOL if line[column] != ours[column]]
    assert line["ours"] == ("; ".join(instead) or "the same")
    assert line["source"]
    assert ROWS[name].paper.source
    if instead:
        assert ROWS[name].paper.differs
