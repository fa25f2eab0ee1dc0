"""The options of all verbs that sample: what overrides a recipe's `sample` section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dic_repa.cli import completion
from dic_repa.cli.options import option_group, recipe_option
from dic_repa.errors import UserError
from dic_repa.recipe import GuidanceSection, Recipe, SampleSection, load_recipe
from dic_repa.registry import read_source
from dic_repa.sampling import override_sampling

if TYPE_CHECKING:
    from dic_repa.sampling.load import Checkpoint

# Read from the source files, since an import would import torch.
DIFFUSION_FORMS = read_source("dic_repa.samplers.sde", "diffusion_forms")
GUIDANCE_SCHEDULES = read_source("dic_repa.samplers.guidance", "guidance_schedules")
LAST_STEPS = read_source("dic_repa.samplers.sde", "last_steps")
TIME_GRIDS = read_source("dic_repa.samplers.grids", "time_grids")


def _choices(title: str, known: dict[str, str]) -> str:
    width = max(map(len, known))
    return f"\b\n{title}\n" + "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in known.items()) + "\n\n"


EPILOG = (
    _choices("Time grids (--grid; arguments behind a colon: shifted:shift=3):", TIME_GRIDS)
    + _choices("Diffusion forms of an SDE (--diffusion):", DIFFUSION_FORMS)
    + _choices("Last steps of an SDE (--last-step):", LAST_STEPS)
    + _choices("Guidance schedules (--schedule):", GUIDANCE_SCHEDULES)
)


# Words around the schema's text, and functions that complete a value.
_FORMS = {
    "steps": "Steps {}",
    "weights": "Which weights to sample from: {}",
    "grid": "{}: " + ", ".join(TIME_GRIDS) + ", or the times, such as 1,0.5,0",
    "diffusion": "{}: " + ", ".join(DIFFUSION_FORMS),
    "schedule": "Shape {}",
    "doubled": "Guidance takes {}",
    "pixels": "How values become the pixels' levels. {}",
    "precision": "Number format {}",
}
_COMPLETIONS = {"solver": completion.solvers, "weak": completion.runs}
_CLASSES = {
    "balanced": "Take all classes equally often.  [recipe, else this]",
    "random": "Draw the class of each image from the seed and its index.",
    "data": "Take each class as often as the training data does.",
}


def _class_options(command: Callable) -> Callable:
    """--balanced-classes and so on: `--classes` says which classes there are to choose from."""
    for way, text in reversed(_CLASSES.items()):
        command = click.option(f"--{way}-classes", "drawn_classes", flag_value=way, default=None, help=text)(command)
    return command


# Keys whose option the schema alone does not make.
_OWN = {
    "classes": _class_options,
    "scale": click.option(
        "--scale", type=float, help="1: no guidance; above 1: towards the class.  [recipe, else no guidance]"
    ),
    "kind": click.option("--cfgpp", "kind", flag_value="cfg++", help="CFG++: a --scale from 0 to 1, fixed steps."),
}
_KEYS = {"drawn_classes", *SampleSection.model_fields, *GuidanceSection.model_fields}
_SAMPLES = ("num", "seed", "classes", "pixels", "weights")
_SOLVER = ("solver", *SampleSection.solver_keys())


def sampling_option(key: str) -> Callable:
    """The option that overrides this key of a recipe's `sample` section, or of its `guidance`."""
    place = "sample.guidance" if key in GuidanceSection.model_fields else "sample"
    made = recipe_option(f"{place}.{key}", _FORMS.get(key, "{}"), shell_complete=_COMPLETIONS.get(key))
    return _OWN.get(key, made)


def sampling_options(command: Callable) -> Callable:
    """An option for each key of a recipe's `sample` section, in groups; pass their values to `sample_settings`."""
    others = [key for key in SampleSection.model_fields if key not in (*_SAMPLES, *_SOLVER, "guidance")]
    groups = {
        "Samples": _SAMPLES,
        "Solver": [key for key in _SOLVER if key != "options"],  # a mapping, for a recipe alone
        "Guidance (only --scale is needed)": GuidanceSection.model_fields,
        "Speed and places": others,
    }
    for title, keys in reversed(groups.items()):
        command = option_group(title, *map(sampling_option, keys))(command)
    return command


def sampled_first(command: Callable) -> Callable:
    """The options of a verb that samples a run or a checkpoint before it looks at the images."""
    recipe = click.option(
        "--recipe",
        shell_complete=completion.recipes,
        help="A recipe whose `sample` section to use.  [default: the run's own]",
    )
    again = click.option("--again", is_flag=True, help="Begin anew, though this was done before.")
    title = "How a run or a checkpoint is sampled first"
    return option_group(title, recipe, again)(sampling_options(command))


def load_for_sampling(path: Path, device: Any, recipe: str | None, **options) -> tuple[Checkpoint, SampleSection]:
    """A run or checkpoint, and how to sample it: as `recipe` says, by default as its own does, with these options."""
    from dic_repa.sampling.load import load

    given = load_recipe(recipe) if recipe else None
    weights = options["weights"] or (given.sample.weights if given else None)
    loaded = load(path, device, given if isinstance(given, Recipe) else None, weights)
    return loaded, sample_settings((given or loaded.recipe).sample, **options)


def sample_settings(base: SampleSection, **options) -> SampleSection:
    """`base` with the options that were given, validated as if they stood in a recipe; other options are left out."""
    given = {name: value for name, value in options.items() if value is not None and name in _KEYS}
    if "drawn_classes" in given:
        given["classes"] = given.pop("drawn_classes")
    if "grid" in given:
        given["grid"] = _parse_grid(given["grid"])
    guidance = {name: given.pop(name) for name in GuidanceSection.model_fields if name in given}
    settings = override_sampling(base, guidance, **given)
    for name in guidance if base.guidance is None else ():
        needed = "internal" if name.startswith("internal") else "scale"
        if needed not in guidance:
            option = "--cfgpp" if name == "kind" else f"--{name.replace('_', '-')}"
            raise UserError(f"{option} needs --{needed}: the recipe has no guidance to take it from")
    return settings


def _parse_grid(text: str) -> dict:
    """'karras', 'shifted:shift=3', 'my_module:MyGrid:rho=5', or the times themselves: '1,0.5,0'."""
    try:
        if text[:1].isdigit():
            return {"times": [float(part) for part in text.split(",")]}
        *parts, arguments = text.split(":") if "=" in text else (text, "")
        name = ":".join(parts)
        if name.count(":") and not name.rpartition(":")[2].isidentifier():
            raise ValueError
        pairs = [pair.partition("=") for pair in arguments.split(",") if pair]
        return {"name": name, "options": {key.strip(): float(value) for key, _, value in pairs}}
    except ValueError:
        raise UserError(f"--grid takes a name, name:argument=number or times such as 1,0.5,0, not '{text}'") from None
