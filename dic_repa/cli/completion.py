"""What the shell offers after <Tab>: names of recipes, runs, solvers, encoders and keys, without importing torch.

Each function takes what click gives it and returns the names that begin with the typed text, or files if none does.
"""

import re
from collections.abc import Iterable
from importlib import resources

from click.shell_completion import CompletionItem

# `dic_repa.encoders` takes seconds to import; a test compares.
ENCODERS = (
    "clip-vit-b clip-vit-l digits-vit dino-vit-b dino-vit-s dinov2-vit-b dinov2-vit-g dinov2-vit-l dinov2-vit-s "
    "dinov2reg-vit-b dinov2reg-vit-g dinov2reg-vit-l dinov2reg-vit-s dinov3-vit-7b dinov3-vit-b dinov3-vit-h+ "
    "dinov3-vit-l dinov3-vit-s dinov3-vit-s+ efficientnet-lite0 efficientnet-lite2 ijepa-vit-g ijepa-vit-h mae-vit-b "
    "mae-vit-h mae-vit-l mocov3-vit-b mocov3-vit-l mocov3-vit-s pe-core-b pe-core-g pe-core-l pe-core-s pe-core-t "
    "pe-spatial-b pe-spatial-g pe-spatial-l pe-spatial-s pe-spatial-t siglip2-vit-b siglip2-vit-g siglip2-vit-l "
    "siglip2-vit-so400m timm:"
).split()

AUTOENCODERS = (  # for the same reason; a test compares
    "dc-ae-f32c32 dc-ae-f32c32-sana dc-ae-f64c128 diffusers: e2e-invae e2e-sdvae e2e-vavae flux1-vae flux2-vae "
    "lite-vae none rae-dinov2-b rae-dinov2-b-512 rae-dinov2-l rae-dinov2-s sd-vae-ft-ema sd-vae-ft-mse sd3.5-vae "
    "sdxl-vae sdxl-vae-fp16-fix va-vae "
).split()

# Modules of `dic_repa.samplers`, with the registry that each files its solvers into.
_SOLVERS = (("ode_solvers", "ode_solvers"), ("sde", "sde_solvers"), ("ddpm", "ddpm_solvers"))


def recipes(_context, _parameter, typed: str) -> list[CompletionItem]:
    """The package's recipes, else files."""
    files = resources.files("dic_repa.recipes").iterdir()
    return _offered(sorted(file.name[:-5] for file in files if file.name.endswith(".yaml")), typed)


def runs(_context, _parameter, typed: str) -> list[CompletionItem]:
    """The runs in runs/, by path or by name, else files."""
    from dic_repa.runs.folder import RUNS, runs_in

    found = runs_in(RUNS)
    return _offered([str(run) for run in found], typed, [str(run) for run in found if run.name.startswith(typed)])


def solvers(_context, _parameter, typed: str) -> list[CompletionItem]:
    """The solvers; in a list with commas, for the last one."""
    from dic_repa.registry import read_source

    before, comma, _ = typed.rpartition(",")
    known = [name for module, variable in _SOLVERS for name in read_source(f"dic_repa.samplers.{module}", variable)]
    return _offered([f"{before}{comma}{name}" for name in known], typed, files=False)


def encoders(_context, _parameter, typed: str) -> list[CompletionItem]:
    """The encoders of the package."""
    return _offered(ENCODERS, typed, files=False)


def autoencoders(_context, _parameter, typed: str) -> list[CompletionItem]:
    """The autoencoders of the package, else files: a name may be a folder."""
    return _offered(AUTOENCODERS, typed)


def parts(_context, _parameter, typed: str) -> list[CompletionItem]:
    """The kinds of part, as `dic_repa.protocols` has them."""
    from dic_repa import protocols

    names = [name for name, value in vars(protocols).items() if getattr(value, "__module__", "") == protocols.__name__]
    return _offered(
        [re.sub("(?<=[a-z])(?=[A-Z])|(?<=ODE|SDE)(?=S)|(?<=DDPM)(?=S)", "-", n).lower() for n in names],
        typed,
        files=False,
    )


def keys(_context, _parameter, typed: str) -> list[CompletionItem]:
    """The keys of a recipe."""
    from dic_repa.recipe import Recipe
    from dic_repa.recipe.keys import list_keys

    return _offered(list_keys(Recipe), typed, files=False)


def _offered(names: Iterable[str], typed: str, others: Iterable[str] = (), files: bool = True) -> list[CompletionItem]:
    found = [CompletionItem(name) for name in dict.fromkeys([*filter(lambda n: n.startswith(typed), names), *others])]
    return found or [CompletionItem(typed, type="file")] * files
