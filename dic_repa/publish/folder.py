"""The folder that is published: safetensors, config, recipe, data.json, scores, a grid of samples, the card."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from dic_repa.data.images import decode_image
from dic_repa.data.saved import DATA_FILE, SavedData
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.lock import locked_output
from dic_repa.files.manifest import MANIFEST, write_manifest
from dic_repa.files.outputs import check_folder
from dic_repa.files.pictures import draw_grid, save_picture, shown_in_grid
from dic_repa.files.reading import read_file, read_json
from dic_repa.files.weights import WRITE_ERRORS
from dic_repa.models.pretrained import CONFIG, WEIGHTS
from dic_repa.publish.card import CARD, GRID, Page, model_card
from dic_repa.publish.paths import public_recipe, without_paths
from dic_repa.publish.scores import SCORES, Scores, scores_of
from dic_repa.recipe import to_yaml
from dic_repa.runs.checkpoints import RAW
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.progress import warn
from dic_repa.sampling import override_sampling
from dic_repa.sampling.labels import balanced_labels
from dic_repa.sampling.load import Checkpoint, load
from dic_repa.sampling.weights import home_of

RECIPE = "recipe.yaml"
FILES = (CARD, CONFIG, WEIGHTS, RECIPE, DATA_FILE, SCORES, GRID, MANIFEST)
CLASSES, COLUMNS = 10, 4  # of the grid, where the run has none


def write_repository(
    model: Checkpoint, folder: str | Path, repository: str, license: str | None = None, dtype: str = "float32",
    revision: str | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write into `folder` all that a repository of the hub holds, and return it.

    Args:
        model: what `load` gives; its scores are those of the run that it is of, if its weights are still the run's.
        repository: 'owner/name', for the card.
        license: of the weights, by the hub's short name ('apache-2.0'); None: the card says that none was chosen.
        dtype: of the weights, as torch calls it.
        revision: the branch that it is for, for the card.
        overwrite: replace what this has written there before.

    Raises:
        UserError: the folder exists, or is not one of ours, or no samples can be drawn.
    """
    folder = Path(folder)
    check_target(folder, "model", overwrite)
    changed = model.source.is_dir() and not _as_stored(model)
    scores = Scores() if changed else scores_of(model)
    recipe, data = public_recipe(model.recipe), _public(model.data)
    grid = (None if changed else _picture_beside(model, scores)) or _draw(model)
    page = Page(model, recipe, data, scores, repository, license, revision, changed, grid is not None, _taken(model))
    denoiser = copy.deepcopy(model.denoiser).to(getattr(torch, dtype)) if dtype != "float32" else model.denoiser
    try:
        with locked_output(folder), write_aside(folder, "model") as aside:
            denoiser.save_pretrained(aside)
            (aside / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
            if data:
                data.write(aside)
            if scores.step is not None or scores.scored:
                (aside / SCORES).write_text(scores.to_json(), encoding="utf-8")
            if grid:
                save_picture(grid, aside / GRID)
            (aside / CARD).write_text(model_card(page), encoding="utf-8")
            # Not of the card and the picture, which may be edited on the hub.
            write_manifest(aside, [name for name in (CONFIG, WEIGHTS, RECIPE, DATA_FILE) if (aside / name).is_file()])
    except WRITE_ERRORS as error:
        raise UserError(f"{folder} could not be written ({first_line(error)})") from None
    return folder


def check_target(folder: Path, kind: str, overwrite: bool) -> None:
    """A UserError if no folder of this kind may be written there."""
    if check_folder(folder, kind) and not overwrite:
        raise UserError(f"{folder} exists; pass --overwrite to replace it")


def _taken(model: Checkpoint) -> str:
    """What the run took of the weights that it began with, and what was new; "" where that is not known."""
    with contextlib.suppress(OSError, UserError, LookupError, TypeError, AttributeError):
        start = read_json(RunFolder(home_of(model.source)).environment_file, "")[0]["start"]
        return f"taken: {'; '.join(start['taken'])}; new: {'; '.join(start['new']) or 'nothing'}"
    return ""


def _public(data: SavedData | None) -> SavedData | None:
    """What is saved of the data, without the place of an autoencoder on this machine."""
    if data is None or data.autoencoder is None:
        return data
    return replace(data, autoencoder=replace(data.autoencoder, name=without_paths(data.autoencoder.name)))


def _as_stored(model: Checkpoint) -> bool:
    """Whether the model has the weights that lie where it was loaded from; else no score there is of it."""
    is_raw = (model.source / "state.json").is_file()
    try:
        stored = load(model.source, recipe=model.recipe, weights=RAW if is_raw else None).denoiser.state_dict()
    except UserError:  # it has been removed since
        return False
    own = model.denoiser.state_dict()
    return own.keys() == stored.keys() and all(torch.equal(own[name].cpu(), stored[name]) for name in own)


def _picture_beside(model: Checkpoint, scores: Scores) -> Image.Image | None:
    """The grid of samples of these weights that the run, or an earlier folder to publish, has; its pixels alone."""
    files = [scored._picture for scored in scores.scored if scored._picture]
    files += (
        [RunFolder(home_of(model.source)).grid_file(scores.step)] if scores.weights == "ema" and scores.step else []
    )
    files += [model.source / GRID]
    found = next((file for file in files if file.is_file()), None)
    return decode_image(read_file(found), str(found)) if found else None


def _draw(model: Checkpoint) -> Image.Image | None:
    """A few samples of the first classes, drawn as the recipe says; None, with a warning, if they cannot be drawn."""
    known = model.condition.count if model.recipe.train.label_dropout < 1 else 0
    classes = range(min(known, CLASSES)) if known else None
    settings = override_sampling(model.recipe.sample, None, num=COLUMNS * len(classes or range(COLUMNS)))
    labels = balanced_labels(model.recipe, model.condition, settings.num, classes)
    try:
        images = torch.cat(list(model.sampler(settings)(labels)))
    except UserError as error:  # an autoencoder, or a weaker model to guide with, is not on this machine
        warn(f"no grid of samples: {error}")
        return None
    shown = shown_in_grid(labels, COLUMNS)
    return draw_grid(images[shown], labels[shown], model.condition.names, COLUMNS)
