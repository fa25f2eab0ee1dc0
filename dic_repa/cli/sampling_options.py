"""The options of `sample` and `evaluate` that override a recipe's `sample` section, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable

import click

from dic_repa.cli import completion
from dic_repa.cli.options import Count, option_group, recipe_option
from dic_repa.errors import UserError
from dic_repa.recipe import SampleSection
from dic_repa.registry import read_source
from dic_repa.sampling.settings import override_sampling

# Read, since importing them would import torch.
DIFFUSION_FORMS = read_source("dic_repa.samplers.diffusion_coefficients", "diffusion_forms")
GUIDANCE_SCHEDULES = read_source("dic_repa.samplers.guidance", "guidance_schedules")
LAST_STEPS = read_source("dic_repa.samplers.sde", "last_steps")
TIME_GRIDS = read_source("dic_repa.samplers.grids", "time_grids")

_GUIDANCE_KEYS = ("scale", "interval", "channels", "schedule", "rescale", "weak", "kind")


def _choices(title: str, known: dict[str, str]) -> str:
    width = max(map(len, known))
    return f"\b\n{title}\n" + "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in known.items()) + "\n\n"


EPILOG = (
    _choices("Time grids (--grid; arguments behind a colon: shifted:shift=3):", TIME_GRIDS)
    + _choices("Diffusion forms of an SDE (--diffusion):", DIFFUSION_FORMS)
    + _choices("Last steps of an SDE (--last-step):", LAST_STEPS)
    + _choices("Guidance schedules (--schedule):", GUIDANCE_SCHEDULES)
)


def sampling_options(command: Callable) -> Callable:
    """The options that override a recipe's `sample` section, in groups; `sample_settings` takes them."""
    for options in (_PLACE, _GUIDANCE, _SOLVER, _SAMPLES):
        command = options(command)
    return command


def _one_of(known: dict[str, str]) -> str:
    return "{}: " + ", ".join(known)


_SAMPLES = option_group(
    "Samples",
    recipe_option("--num", "sample.num", type=Count(1)),
    recipe_option("--seed", "sample.seed", type=Count(0)),
    click.option(
        "--random-classes/--balanced-classes",
        default=None,
        help="Draw each image's class, from the seed and its index; or each class as often as the others.  "
        "[recipe, else balanced]",
    ),
    recipe_option("--weights", "sample.weights", "Which weights to sample from: {}"),
)
_SOLVER = option_group(
    "Solver",
    recipe_option("--solver", "sample.solver", shell_complete=completion.solvers),
    recipe_option("--steps", "sample.steps", "Steps {}", type=Count(1)),
    recipe_option("--rtol", "sample.rtol", type=float),
    recipe_option("--atol", "sample.atol", type=float),
    recipe_option("--grid", "sample.grid", "{}: " + ", ".join(TIME_GRIDS) + ", or the times, such as 1,0.5,0"),
    recipe_option("--diffusion", "sample.diffusion", _one_of(DIFFUSION_FORMS)),
    recipe_option("--diffusion-norm", "sample.diffusion_norm", type=float),
    recipe_option("--last-step", "sample.last_step"),
    recipe_option("--last-step-size", "sample.last_step_size", type=float),
    recipe_option("--eta", "sample.eta", type=float),
    recipe_option("--clip", "sample.clip", is_flag=True),
)
_GUIDANCE = option_group(
    "Guidance, of which --scale alone is needed",
    click.option("--scale", type=float, help="1 is none, above goes towards the class.  [recipe, else no guidance]"),
    recipe_option("--interval", "sample.guidance.interval", type=(float, float)),
    recipe_option("--channels", "sample.guidance.channels", type=Count(1)),
    recipe_option("--schedule", "sample.guidance.schedule", "Shape {}"),
    recipe_option("--rescale", "sample.guidance.rescale", type=float),
    click.option("--cfgpp", "kind", flag_value="cfg++", help="CFG++: a --scale from 0 to 1, fixed steps."),
    recipe_option("--weak", "sample.guidance.weak", shell_complete=completion.runs),
)
_PLACE = option_group(
    "Speed and places",
    recipe_option("--precision", "sample.precision", "Number format {}"),
    recipe_option("--compile", "sample.compile"),
    recipe_option("--batch-size", "sample.batch_size", type=Count(1)),
    recipe_option("--decode-batch", "sample.decode_batch", type=Count(1)),
    recipe_option("--autoencoder", "sample.autoencoder"),
)


def sample_settings(base: SampleSection, **options) -> SampleSection:
    """`base` with the options that were given, validated as if they stood in a recipe."""
    given = {name: value for name, value in options.items() if value is not None}
    if "random_classes" in given:
        given["classes"] = "random" if given.pop("random_classes") else "balanced"
    if "grid" in given:
        given["grid"] = _parse_grid(given["grid"])
    guidance = {name: given.pop(name) for name in _GUIDANCE_KEYS if name in given}
    settings = override_sampling(base, guidance, **given)
    if guidance and base.guidance is None and "scale" not in guidance:
        option = "--cfgpp" if "kind" in guidance else f"--{next(iter(guidance))}"
        raise UserError(f"{option} needs --scale: the recipe has no guidance to take it from")
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
