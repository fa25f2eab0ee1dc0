"""Recipes from files: found, merged with their bases, overridden, checked.

A recipe is a YAML file. It may name another as its `base:` and then states only what makes it different: dicts are
merged (null empties one), anything else is replaced; a dotted key, such as `alignments.0.weight`, reaches into a list.
A recipe that names a model of another family drops the base's `model` section, because sizes have other keys there. One
that names another data set, objective, optimizer or schedule drops the base's `options` of it.
"""

import copy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dic_repa.errors import UserError, unknown_name
from dic_repa.limits import check_limit
from dic_repa.recipe.folders import note_folders
from dic_repa.recipe.keys import ABSENT, assign, explain_mistakes
from dic_repa.recipe.schema import Recipe, SamplingRecipe
from dic_repa.recipe.values import read_yaml, write_yaml
from dic_repa.runtime.progress import detail
from dic_repa.trust import came_with_weights, check_code

# Keys that runs of earlier versions have in their recipes.
RENAMED = {
    "train.learning_rate": "optimizer.learning_rate",
    "train.betas": "optimizer.betas",
    "train.weight_decay": "optimizer.weight_decay",
    "train.warmup_steps": "schedule.warmup_steps",
}


def list_recipes() -> dict[str, str]:
    """The recipes that come with the package: name to description."""
    return {name: raw.get("description", "") for name, raw in read_shipped().items()}


def list_paper_rows() -> dict[str, str]:
    """The rows of papers that recipes of the package stand for: `paper.row` to the recipe's name."""
    return {raw["paper"]["row"]: name for name, raw in read_shipped().items() if "paper" in raw}


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), only_read: bool = False
) -> Recipe | SamplingRecipe:
    """The recipe of that name or file, with `overrides` such as 'train.steps=200' (values in YAML), validated.

    Plugins and data that are not in the current folder are also looked for beside the file.

    Args:
        only_read: nothing is built from it, so that it may name code even if it came with weights.

    Raises:
        UserError: There is no such recipe or key, or a key does not take its value; the line says what would do. Or it
            came with weights and names code that is not trusted (`dic_repa.trust`).
    """
    raw = read_recipe(name_or_path)
    if not only_read and any(map(came_with_weights, recipe_files(name_or_path))):
        check_code(raw, name_or_path, _folders(raw, name_or_path))
    for override in overrides:
        override_key(raw, override)
    recipe = validate(raw, name_or_path)
    if isinstance(recipe, Recipe):
        recipe._name = Path(name_or_path).stem
        note_folders(recipe, recipe_files(name_or_path))
    return recipe


def load_training_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), only_read: bool = False) -> Recipe:
    """`load_recipe`, with a UserError for a sampling recipe."""
    recipe = load_recipe(name_or_path, overrides, only_read)
    if isinstance(recipe, SamplingRecipe):
        use = f"dic-repa sample RUN --recipe {name_or_path}"
        raise UserError(f"{name_or_path} is a sampling recipe; use it on a finished run: {use}")
    return recipe


def validate(raw: dict, source: str | Path = "recipe") -> Recipe | SamplingRecipe:
    """The recipe of a plain dict; a UserError lists what is wrong with it in one line."""
    schema = SamplingRecipe if "sample" in raw and not set(raw) - {"description", "paper", "sample"} else Recipe
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {explain_mistakes(schema, error)}") from None


def to_yaml(recipe: BaseModel) -> str:
    """A recipe as YAML, all defaults included, in the schema's order."""
    return write_yaml(recipe.model_dump(mode="json"))


def paper_recipe(recipe: Recipe | SamplingRecipe) -> str | None:
    """The name of the package's recipe for the same row of a paper."""
    return list_paper_rows().get(recipe.paper.row) if recipe.paper else None


def read_shipped() -> dict[str, dict]:
    """The package's recipes by name, each as its file says it."""
    files = {f.name[:-5]: f for f in resources.files("dic_repa.recipes").iterdir() if f.name.endswith(".yaml")}
    return {name: _parse(files[name].read_text(encoding="utf-8"), name) for name in sorted(files)}


def read_recipe(name_or_path: str | Path) -> dict:
    """The plain dict of a name or file, merged with its bases."""
    resolved: dict = {}
    for label, raw in reversed(_with_bases(name_or_path).items()):
        _drop_other_model(resolved, raw)
        _drop_other_options(resolved, raw)
        resolved = _merge(resolved, {key: value for key, value in raw.items() if "." not in str(key)})
        for key, value in raw.items():
            if "." in str(key):
                assign(resolved, key, value, label)
    return resolved


def _folders(raw: dict, name_or_path: str | Path) -> list[str]:
    """Where modules would be looked for: in the `folders` of a plain recipe, and beside its files."""
    given = raw.get("folders")
    beside = [str(file.parent) for file in recipe_files(name_or_path)]
    return [folder for folder in given if isinstance(folder, str)] + beside if isinstance(given, list) else beside


def recipe_files(name_or_path: str | Path) -> list[Path]:
    """The file of that path and those of its bases; none for a recipe of the package."""
    return [Path(label) for label in _with_bases(name_or_path) if label.endswith((".yaml", ".yml"))]


def _with_bases(name_or_path: str | Path) -> dict[str, dict]:
    """A recipe, its base, the base of that and so on: name or path to what its file says, without `base`."""
    found: dict[str, dict] = {}
    base: Any = name_or_path
    while base is not None:
        text, label = _read(base)
        if label in found:
            raise UserError(f"recipes name each other as their base: {' -> '.join([*found, label])}")
        found[label] = _parse(text, label)
        check_limit("bases", len(found), f"{name_or_path}: the number of recipes that it is based on")
        base = found[label].pop("base", None)
        if not isinstance(base, str | None):
            raise UserError(f"{label}: base takes the name or path of a recipe, not {base!r}")
        if base is not None and (beside := Path(label).parent / base).is_file():
            base = beside
    return found


def _read(name_or_path: str | Path) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
        check_limit("recipe-bytes", path.stat().st_size, f"{path}: its length")
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a text file in UTF-8") from None
    file = resources.files("dic_repa.recipes") / f"{name_or_path}.yaml"
    if "/" in str(name_or_path) or not file.is_file():
        if (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is a run; name its recipe, {path / 'recipe.yaml'}")
        if path.exists():
            raise UserError(f"{path} is not a recipe: name a file that ends in .yaml, or one of `dic-repa recipes`")
        names = [f.name[:-5] for f in resources.files("dic_repa.recipes").iterdir() if f.name.endswith(".yaml")]
        raise unknown_name("recipe", str(name_or_path), names)
    return file.read_text(encoding="utf-8"), str(name_or_path)


def _parse(text: str, label: str) -> dict:
    raw = read_yaml(text, label)
    if not isinstance(raw, dict):
        raise UserError(f"{label} is not a recipe: it must be a mapping of keys to values")
    for dotted in filter(lambda key: "." in str(key), raw):
        held: Any = raw
        for part in str(dotted).split("."):
            held = held.get(part, ABSENT) if isinstance(held, dict) else ABSENT
        if held != ABSENT:
            raise UserError(f"{label}: {dotted} is given twice, once in its section; keep one")
    return _with_todays_keys(raw, label)


def _with_todays_keys(raw: dict, label: str) -> dict:
    """A recipe of an earlier version with today's keys."""
    for old, new in RENAMED.items():
        section, key = old.split(".")
        to, name = new.split(".")
        held, taken = raw.get(section), raw.get(to) or {}
        if not isinstance(taken, dict) or name in taken or new in raw:
            continue  # the schema says what is wrong
        if isinstance(held, dict) and key in held:
            raw[to] = {**taken, name: held.pop(key)}
        elif old in raw:
            raw[new] = raw.pop(old)
        else:
            continue
        detail(f"{label}: {old} is {new} today")
    return raw


def _drop_other_model(base: dict, top: dict) -> None:
    """Empty the `model` section of `base` if `top` names a model of another family, which has other keys for sizes."""
    name, model = _part_name(top, "model"), base.get("model")
    if name and isinstance(model, dict) and _family(name) != _family(model.get("name", "DiC")):
        del base["model"]


def _drop_other_options(base: dict, top: dict) -> None:
    """Empty the `options` of sections of `base` if `top` names another part, which has other options."""
    for section in ("data", "objective", "optimizer", "schedule"):
        name, below = _part_name(top, section), base.get(section)
        if name and isinstance(below, dict) and below.get("options") and name != below.get("name"):
            below["options"] = {}  # still there, for a recipe that empties it itself


def _part_name(raw: dict, section: str) -> Any:
    held = raw.get(section)
    return raw.get(f"{section}.name") or (held.get("name") if isinstance(held, dict) else None)


def _family(model: str) -> str:
    """'DiC' of 'DiC-XL'."""
    return str(model).partition("-")[0]


def _merge(base: dict, top: dict) -> dict:
    merged = copy.deepcopy(base)
    for key, value in top.items():
        if key == "paper" or not isinstance(merged.get(key), dict):  # one row's results are not another's
            merged[key] = copy.deepcopy(value)
        elif value is None:
            del merged[key]  # back to the section's defaults
        else:
            merged[key] = _merge(merged[key], value) if isinstance(value, dict) else value
    return merged


def override_key(raw: dict, override: str) -> None:
    """Apply one `--set` of the command line, 'train.steps=200', to a plain dict."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set takes key=value, such as train.steps=200, not '{override}'")
    value = parse_value(text, f"--set {dotted}")
    _drop_other_options(raw, {dotted: value})
    assign(raw, dotted, value, "--set")


def parse_value(text: str, source: str) -> Any:
    """A value in YAML; a UserError names its `source` if it cannot be read."""
    return read_yaml(text, f"{source}: '{text}'")
