"""Converting checkpoints: the authors' files to ours and back, training checkpoints to small ones."""

import re
from pathlib import Path

import torch

from dic_repa.data.autoencoders.diffusers_models import open_diffusers
from dic_repa.data.autoencoders.ldm import is_ldm, open_ldm, write_ldm
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError, first_few, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.lock import locked_output
from dic_repa.files.manifest import write_manifest
from dic_repa.files.outputs import AUTHORS_FILES, MARK
from dic_repa.files.reading import read_file
from dic_repa.files.weights import WRITE_ERRORS, read_tensors, save_tensors
from dic_repa.models import load_authors_checkpoint, load_denoiser
from dic_repa.models.adapters import is_adapter, save_adapters
from dic_repa.models.authors import authors_state_dict
from dic_repa.models.pretrained import Pretrained
from dic_repa.recipe import load_training_recipe, to_yaml
from dic_repa.recipe.build import import_plugins
from dic_repa.sampling.load import check_recipe
from dic_repa.sampling.weights import checkpoint_of, lora_of, read_raw, read_weights, weights_folder


def convert(
    source: Path,
    target: Path,
    dtype: str = "float32",
    weights: str = "ema",
    family: str | None = None,
    recipe: str | None = None,
) -> Pretrained:
    """Write the checkpoint `source` to `target`, over what is there.

    Args:
        source: Any checkpoint that `load_any` reads.
        target: A file in its authors' layout if it ends as one of `AUTHORS_FILES`, otherwise a folder to sample
            from.
        dtype: Of the weights, as torch calls it.
        weights: Which of a training checkpoint: an average's name, or raw.
        family: The model of an authors' checkpoint, if its file does not say.
        recipe: What the weights were trained by, if no recipe lies beside them.

    Returns:
        The denoiser that was written.

    Raises:
        UserError: `source` cannot be read, was not trained by `recipe`, or `target` cannot be written.
    """
    model, recipe_file = load_any(source, weights, family)
    if recipe:
        check_recipe(load_training_recipe(recipe), model, recipe)
    model.to(getattr(torch, dtype))
    try:
        with locked_output(target):
            if target.suffix in AUTHORS_FILES:
                _write_authors(model, target)
            else:
                _write_folder(model, target, recipe, recipe_file)
    except WRITE_ERRORS as error:
        raise UserError(f"{target} could not be written ({first_line(error)})") from None
    return model


def is_autoencoder(source: Path) -> bool:
    """Whether `source` is an autoencoder: a file in LDM's layout, or the folder of an AutoencoderKL of diffusers."""
    if source.is_file():
        return is_ldm(read_tensors(source)[0])
    config = source / "config.json"
    return config.is_file() and bool(re.search(rb'"_class_name":\s*"AutoencoderKL"', read_file(config, "record-bytes")))


def convert_autoencoder(source: Path, target: Path, dtype: str = "float32") -> torch.nn.Module:
    """Write an autoencoder that `is_autoencoder` knows to `target`: a file in LDM's layout, with shift and scale in one
    beside it; or diffusers' folder, with these as `latents_mean` and `latents_std`. Returns diffusers' model.
    """
    autoencoder = open_ldm(str(source)) if source.is_file() else open_diffusers(str(source))
    autoencoder.model.to(getattr(torch, dtype))
    try:
        with locked_output(target):
            if target.suffix in AUTHORS_FILES:
                write_ldm(autoencoder, target)
            else:
                with write_aside(target, "model") as aside:
                    autoencoder.model.save_pretrained(aside)
                    write_manifest(aside)
    except WRITE_ERRORS as error:
        raise UserError(f"{target} could not be written ({first_line(error)})") from None
    return autoencoder.model


def convert_adapters(source: Path, target: Path) -> int:
    """Write the adapters of a run with `train.lora` into the folder `target`, as peft reads them, and return how many
    parameters they have.

    They are not averaged: an average of their products is no product of such small matrices.

    Raises:
        UserError: `source` has no adapters, or more that was trained.
    """
    folder = weights_folder(source)
    lora = lora_of(folder)
    if lora.also:
        raise UserError(
            f"{source} has trained {first_few(lora.also, 5)} besides its adapters, which a folder of adapters cannot "
            "hold; leave --lora-only out"
        )
    model, tensors = load_any(source)[0], read_raw(checkpoint_of(folder))
    if not any(map(is_adapter, tensors)):
        raise UserError(f"{source} has no training checkpoint, and so no adapters; name the run that was trained")
    try:
        with locked_output(target), write_aside(target, "model") as aside:
            aside.mkdir(exist_ok=True)
            save_adapters(model, tensors, lora.rank, lora.alpha, aside)
            write_manifest(aside)
    except WRITE_ERRORS as error:
        raise UserError(f"{target} could not be written ({first_line(error)})") from None
    return sum(tensor.numel() for name, tensor in tensors.items() if is_adapter(name))


def load_any(source: Path, weights: str = "ema", family: str | None = None) -> tuple[Pretrained, Path | None]:
    """The denoiser of any kind of checkpoint, and the recipe.yaml beside it if there is one.

    Raises:
        UserError: `source` is not a checkpoint, or lacks these weights.
    """
    if source.is_file():
        return load_authors_checkpoint(source, family), None
    if not source.is_dir() and len(source.parts) > 1:
        return load_denoiser(source), None  # a hub id
    folder = weights_folder(source)
    recipe_file = folder / "recipe.yaml"
    if recipe_file.is_file():
        import_plugins(load_training_recipe(recipe_file))  # they may register the denoiser
    return read_weights(folder, weights)[0], recipe_file if recipe_file.is_file() else None


def _write_authors(model: Pretrained, target: Path) -> None:
    state = authors_state_dict(model)
    with write_aside(target) as aside:
        if target.suffix == ".safetensors":
            save_tensors(state, aside, {"made_by": MARK})
        else:
            with aside.open("wb") as file:  # with a path, torch would hide a disk's error
                torch.save({"made_by": MARK, "ema": state}, file)  # "ema": where the authors' sampling looks first


def _write_folder(model: Pretrained, target: Path, recipe: str | None, recipe_file: Path | None) -> None:
    data = SavedData.read(recipe_file.parent) if recipe_file else None
    trained_by = recipe or recipe_file
    text = to_yaml(load_training_recipe(trained_by, only_read=True)) if trained_by else None
    with write_aside(target, "model") as aside:
        model.save_pretrained(aside)
        if text:
            (aside / "recipe.yaml").write_text(text, encoding="utf-8")
        if data:
            data.write(aside)
        write_manifest(aside)
