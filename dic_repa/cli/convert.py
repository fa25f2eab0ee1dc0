"""`dic-repa convert`."""

from __future__ import annotations

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK, check_file, check_folder

DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FILES = (".pt", ".pth", ".safetensors")


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="Of the weights.")
@click.option(
    "--weights",
    default="ema",
    help="Which of a training checkpoint: ema, another average such as ema-0.999, or raw (not averaged).",
)
@click.option(
    "--recipe", help="What the authors' weights were trained by, such as dic-xl-ddpm; `dic-repa sample` needs it."
)
@click.option("--family", help="What an authors' checkpoint is of, where its file does not tell: DiT, SiT or REPA.")
@click.option("--overwrite", is_flag=True, help="Write over what convert has written at TARGET.")
def command(
    source: Path, target: Path, dtype: str, weights: str, recipe: str | None, family: str | None, overwrite: bool
):
    """Convert the checkpoint SOURCE into TARGET.

    SOURCE is a run, one of its checkpoints, a folder or hub id that `save_pretrained` made, or a file of the authors'
    public code (DiC, and to read also DiT, SiT, REPA and U-ViT). TARGET is a file in the DiC authors' layout if it ends
    in .pt, .pth or .safetensors, otherwise a folder to sample from, which `DiC.from_pretrained` loads.

    \b
    Examples:
      dic-repa convert runs/digits-urepa small --dtype fp16            a run's averaged weights, in half the space
      dic-repa convert DiC-XL.pt dic-xl --recipe dic-xl-ddpm           the authors' file, ready to sample from
      dic-repa convert runs/mine DiC-mine.pt                           for the authors' code
    """
    if target.suffix[1:].isalpha() and target.suffix not in FILES and not target.is_dir():
        known = f"{', '.join(FILES)} are files"
        raise UserError(f"{target}: {target.suffix} is no ending that convert writes; {known}, and a folder has none")
    if target.suffix in FILES:
        check_file(target)
    there = target.exists() if target.suffix in FILES else check_folder(target, "model")
    if there and not overwrite:
        raise UserError(f"{target} exists; pass --overwrite to replace it")

    import torch

    from dic_repa.files.weights import WRITE_ERRORS

    model, recipe_file = load(source, weights, family)
    if recipe:
        check_recipe(recipe, model)
    model.to(getattr(torch, DTYPES[dtype]))
    try:
        if target.suffix in FILES:
            _write_authors(model, target)
        else:
            _write_folder(model, target, recipe, recipe_file)
    except WRITE_ERRORS as error:
        raise UserError(f"{target} could not be written ({first_line(error)})") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in ([target] if target.is_file() else target.iterdir()))
    click.echo(
        f"{target}: {type(model).__name__} with {parameters / 1e6:.4g} M parameters in {dtype}, {size / 1e6:.4g} MB"
    )


def load(source: Path, weights: str = "ema", family: str | None = None):
    """The denoiser of any kind of checkpoint, and the recipe.yaml beside it, or None where there is none.

    A UserError says what `source` is not, or lacks.
    """
    from dic_repa.models import load_authors_checkpoint, load_denoiser
    from dic_repa.runs.folder import RunFolder, suggest_runs
    from dic_repa.sampling.load import load_raw

    if not source.exists() and len(source.parts) == 1 and (meant := suggest_runs(source)):  # no hub id either
        raise UserError(f"there is no run or checkpoint folder {source}{meant}")
    if source.is_file():
        return load_authors_checkpoint(source, family), None
    folder = source
    if (source / "checkpoints").is_dir():
        newest = RunFolder.open(source).newest_checkpoint()
        if newest is None:
            raise UserError(f"{source} has no checkpoint yet")
        folder = newest
    averages = sorted(path.name for path in folder.glob("ema*") if path.is_dir())
    if not averages:  # an inference checkpoint, a folder or a hub id
        return load_denoiser(source), _existing(source / "recipe.yaml")
    if weights not in ("raw", *averages):
        raise UserError(f"{folder} has no weights '{weights}'; it has {', '.join(averages)} and raw")
    _import_plugins(folder / averages[0] / "recipe.yaml")
    model = load_denoiser(folder / (averages[0] if weights == "raw" else weights))
    if weights == "raw":
        load_raw(model, folder)
    return model, _existing(folder / averages[0] / "recipe.yaml")


def check_recipe(name: str, model) -> None:
    """A UserError where `model` cannot have been trained by the recipe `name`: for other channels, classes or sizes."""
    from dic_repa.models import forward_on_meta
    from dic_repa.recipe import load_training_recipe
    from dic_repa.recipe.build import data_traits, import_plugins

    recipe = load_training_recipe(name)
    import_plugins(recipe)
    # Weights fit whether or not the data that is here has mirrored images, which training would ask for.
    options = {key: value for key, value in recipe.data.options.items() if key != "flip"}
    traits, assumed = data_traits(recipe.data.model_copy(update={"options": options}))
    known = {"channels": (traits.channels, model.in_channels)}
    if not assumed or "num_classes" in recipe.data.options:
        known["classes"] = (traits.num_classes, model.num_classes)
    for what, (wanted, found) in known.items():
        if wanted != found:
            raise UserError(f"the data of {name} has {wanted} {what}, the model is for {found}; name its own recipe")
    forward_on_meta(model, recipe.data.size, recipe.data.size)


def _import_plugins(recipe_file: Path) -> None:
    """Import what the recipe names, so that a denoiser of the user's own is found."""
    from dic_repa.recipe import load_training_recipe
    from dic_repa.recipe.build import import_plugins

    if recipe_file.is_file():
        import_plugins(load_training_recipe(recipe_file))


def _write_authors(model, target: Path) -> None:
    import torch

    from dic_repa.files.weights import save_tensors
    from dic_repa.models.authors import authors_state_dict

    state = authors_state_dict(model)
    with write_aside(target) as aside:
        if target.suffix == ".safetensors":
            save_tensors(state, aside, {"made_by": MARK})
        else:
            with aside.open("wb") as file:  # given its path, torch would tell of another cause than the disk's
                torch.save({"made_by": MARK, "ema": state}, file)  # "ema": where the authors' sampling looks first


def _write_folder(model, target: Path, recipe: str | None, recipe_file: Path | None) -> None:
    from dic_repa.data.saved import SavedData
    from dic_repa.recipe import load_training_recipe, to_yaml

    data = SavedData.read(recipe_file.parent) if recipe_file else None
    trained_by = recipe or recipe_file
    text = to_yaml(load_training_recipe(trained_by)) if trained_by else None
    with write_aside(target, "model") as aside:
        model.save_pretrained(aside)
        if text:
            (aside / "recipe.yaml").write_text(text, encoding="utf-8")
        if data:
            data.write(aside)


def _existing(file: Path) -> Path | None:
    return file if file.is_file() else None
