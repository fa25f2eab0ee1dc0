"""A checkpoint to sample from, found by the path that a user gives: a run, a checkpoint, averaged weights, a repository
on the hub, or a file of public code."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dic_repa.conditions import ClassLabels, Condition, class_labels, condition_of_model
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError, did_you_mean
from dic_repa.files.hub import fetch_model, is_hub_id, use_pins
from dic_repa.files.manifest import MANIFEST, check_whole, find_damage
from dic_repa.files.outputs import AUTHORS_FILES
from dic_repa.files.shards import tensor_files
from dic_repa.files.weights import load_weights, read_tensors, weights_fingerprint
from dic_repa.models import forward_on_meta, load_authors_checkpoint, load_denoiser
from dic_repa.models.adapters import is_adapter, merge
from dic_repa.models.pretrained import CONFIG, WEIGHTS, Pretrained
from dic_repa.recipe import LoraSection, Recipe, SampleSection, load_training_recipe
from dic_repa.recipe.build import build_class_names, build_decoder, build_objective, data_traits, import_plugins
from dic_repa.runs.checkpoints import RAW, checkpoint_step, find_stranger
from dic_repa.runs.folder import RunFolder, suggest_runs
from dic_repa.runtime.progress import detail, warn
from dic_repa.sampling.editing import Editing
from dic_repa.sampling.sampler import Sampler, check_sampling
from dic_repa.trust import trusting_code


@dataclass
class Checkpoint(Editing):
    """A denoiser to sample from, its recipe, and what is known of its data; `Editing` has what it does with images."""

    denoiser: Pretrained
    recipe: Recipe
    source: Path
    data: SavedData | None = None

    @property
    def weights_file(self) -> Path:
        """The file of the weights, or where its parts are."""
        return self.source if self.source.is_file() else self.source / WEIGHTS

    @cached_property
    def condition(self) -> Condition:
        """What the denoiser is conditioned on, with the names of classes or with examples if they are known."""
        taken = condition_of_model(self.denoiser)
        assert taken is not None  # every saved denoiser has one
        if not isinstance(taken, ClassLabels):
            return self.data.condition if self.data and self.data.condition.shape == taken.shape else taken
        known = self.data and self.data.condition
        names = known.names if known else build_class_names(self.recipe.data, taken.count)
        return class_labels(taken.count, names, known.counts if isinstance(known, ClassLabels) else None)

    def sampler(self, settings: SampleSection) -> Sampler:
        """What samples from the denoiser by `settings`, with the objective and the data's shape of its recipe.

        Raises:
            UserError: The model never learnt what the guidance needs, or the settings do not fit together.
        """
        recipe, denoiser = self.recipe, self.denoiser
        guidance, weak, device = settings.guidance, None, next(denoiser.parameters()).device
        if guidance and guidance.internal != 1 and getattr(denoiser, "middle_head", None) is None:
            raise UserError(
                f"{self.source} has no middle head to guide with; sample without internal guidance (--internal 1), or "
                "train a model with model.options.middle_head"
            )
        if guidance and guidance.weak:
            weak = load(find_weak(guidance.weak, self.source), device).denoiser
        elif guidance and guidance.scale != 1 and self.condition.kind == "none":
            raise UserError(
                f"{self.source} was trained on data without classes, so there is no class to guide towards; sample "
                "without guidance (--scale 1; sample.guidance=null in a recipe)"
            )
        elif guidance and guidance.scale != 1 and recipe.train.label_dropout == 0:
            raise UserError(
                f"{self.source} was trained without label dropout, so it has no null class to guide with; "
                "sample without guidance, or with a weaker model (guidance.weak)"
            )
        objective = build_objective(recipe.objective)
        if guidance and guidance.scale != 1 and not weak and getattr(objective, "guided", False):
            raise UserError(
                f"{self.source} has learnt guidance itself (objective.options.omega and kappa); sample without it "
                "(--scale 1; sample.guidance=null in a recipe)"
            )
        shape = (denoiser.in_channels, recipe.data.size, recipe.data.size)
        decode = build_decoder(recipe.data, device, self.data, settings.autoencoder)
        check_sampling(settings, objective)
        if hasattr(objective, "data_mean"):  # guidance corrects by it what the objective changed
            objective.data_mean = mean = self.data.mean if self.data else None
            if mean is not None and mean.shape != shape:
                raise UserError(f"{self.source}: the data's mean is {tuple(mean.shape)}, and the data are {shape}")
            if mean is None and guidance and guidance.scale != 1:
                warn(f"{self.source} has no mean of its training data: guidance is not corrected for the objective")
        return Sampler(denoiser, objective, settings, shape, weak, decode, self.condition)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model to the Hugging Face hub as `repository`, 'owner/name', by `dic_repa.push`.

        Returns:
            The commit's address; or the folder, with `dry_run=True` or `folder=`, which upload nothing.
        """
        from dic_repa import push  # by the front door: publishing stands on this floor

        return push(self, repository, **options)


def load(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", recipe: Recipe | str | Path | None = None,
    weights: str | None = None, trust_code: bool = False, family: str | None = None,
) -> Checkpoint:  # fmt: skip
    """The denoiser of a run (of its newest checkpoint), of one checkpoint, of a folder that `dic-repa convert` or
    `dic-repa push` made, of a repository on the hub, or of a file of the authors' public code.

        model = dic_repa.load("runs/digits-urepa")                          # or what `train` has returned
        model = dic_repa.load("someone/dic-xl")                             # or "someone/dic-xl@revision"
        model = dic_repa.load("DiC-XL.pt", recipe="dic-xl-ddpm")

    Args:
        recipe: What the weights were trained by, a name, a file or a `Recipe`, where no recipe.yaml is with them. Its
            plugins are imported.
        weights: 'ema', 'raw' (the model itself), or a further average such as 'ema-0.999'; by default those of the
            recipe's `sample` section.
        trust_code: run the code that the run names (`dic_repa.trust`).
        family: the model of an authors' file that does not tell: DiT, SiT or REPA.

    Raises:
        UserError: `path` is not a run or checkpoint, or lacks a recipe or these weights; or it is on the hub, which
            cannot be reached. Or it names code to run, and that is not trusted.
    """
    path = os.fspath(path)
    with trusting_code(trust_code):
        given = load_training_recipe(recipe) if isinstance(recipe, str | Path) else recipe
        if Path(path).is_file() and not (Path(path).parent / CONFIG).is_file():
            return _load_file(Path(path), device, given, family)
        place = fetch_model(path, suggest_runs(Path(path))) if is_hub_id(path) else path
        return _load(place, device, given, weights)


def _load(path: str | Path, device: str | torch.device, recipe: Recipe | None, weights: str | None) -> Checkpoint:
    folder = weights_folder(path)
    if (folder / "recipe.yaml").is_file():
        recipe = load_training_recipe(folder / "recipe.yaml")
    if recipe is None:
        lacks = f"is neither a run nor a checkpoint: it has no recipe.yaml and no {CONFIG}{suggest_runs(folder)}"
        if (folder / CONFIG).is_file():
            lacks = "has no recipe.yaml to give objective and data size; put a training recipe there or pass --recipe"
        raise UserError(f"{folder} {lacks}")
    import_plugins(recipe)
    if weights is None:
        weights = "ema" if folder == Path(path) else recipe.sample.weights
    denoiser, source = read_weights(folder, weights)
    use_pins(RunFolder(home_of(folder)).downloads())
    return Checkpoint(denoiser.to(device), recipe, source, SavedData.read(folder))


def _load_file(file: Path, device: str | torch.device, recipe: Recipe | None, family: str | None) -> Checkpoint:
    """The weights of an authors' file, which `recipe` says the rest of."""
    if file.suffix not in AUTHORS_FILES:
        raise UserError(f"{file} is a file; name the folder of a run or a checkpoint")
    if recipe is None:
        raise UserError(
            f"{file} does not say what it was trained by: name that, load(..., recipe='dic-xl-ddpm'); or `dic-repa "
            "convert` makes a folder of it, to sample from"
        )
    denoiser = load_authors_checkpoint(file, family)
    check_recipe(recipe, denoiser)
    return Checkpoint(denoiser.to(device), recipe, file)


def check_recipe(recipe: Recipe, model: Pretrained, name: str = "the recipe") -> None:
    """Raise a UserError if `recipe` is for other channels, classes or sizes than `model`."""
    import_plugins(recipe)
    # Weights fit whether or not the data that is here has mirrored images, which training would ask for.
    options = {key: value for key, value in recipe.data.options.items() if key != "flip"}
    traits, assumed = data_traits(recipe.data.model_copy(update={"options": options}))
    known = {"channels": (traits.channels, model.in_channels)}
    if not assumed or "num_classes" in recipe.data.options:
        known["classes"] = (traits.condition.count, model.num_classes)
    for what, (wanted, found) in known.items():
        if wanted != found:
            raise UserError(f"the data of {name} has {wanted} {what}, the model is for {found}; name its own recipe")
    forward_on_meta(model, recipe.data.size, recipe.data.size)


def weights_folder(path: str | Path) -> Path:
    """The folder of the weights that `load` takes from `path`; a UserError if they are damaged."""
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; {_folder_of(path)}")
    if not path.is_dir():
        raise UserError(f"there is no run or checkpoint folder {path}{suggest_runs(path)}")
    folder = path
    is_run = (path / "recipe.yaml").is_file() and not (path / CONFIG).is_file()
    if is_run or (path / "checkpoints").is_dir():
        newest = RunFolder.open(path).newest_checkpoint("ema")
        if newest is None:
            raise UserError(f"{path} has no checkpoint yet")
        folder = newest
    average = folder / "ema"
    is_average = average.is_dir() and not (average / "checkpoints").is_dir()  # that would be a run of this name
    found = average if is_average else folder
    check_whole(found)
    if stranger := find_stranger(checkpoint_of(found)):
        raise UserError(f"{checkpoint_of(found)} is not what its place says: {stranger}; move it to where it belongs")
    return found


def checkpoint_of(weights: Path) -> Path:
    """The training checkpoint that holds a folder of averaged weights, with links followed; else this folder."""
    weights = weights.resolve()  # checkpoints/best is a link
    ours = any((weights.parent / name).is_file() for name in (WEIGHTS, "state.json"))  # WEIGHTS may be in parts
    return weights.parent if ours else weights


def home_of(weights: Path) -> Path:
    """The run that holds a checkpoint's weights; the checkpoint itself if it is in no run."""
    checkpoint = checkpoint_of(weights)
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint


def read_weights(folder: Path, name: str) -> tuple[Pretrained, Path]:
    """The denoiser with the weights `name` of the checkpoint that `weights_folder` has found, and where these are."""
    source = folder if name == "ema" else _other_weights(folder, name)
    detail(f"weights: {source}")
    if name != RAW:
        return load_denoiser(source), source
    denoiser, tensors = load_denoiser(folder), read_raw(source)
    if any(map(is_adapter, tensors)):
        lora = lora_of(folder)
        tensors = merge(tensors, lora.alpha / lora.rank)
    load_weights(denoiser, tensors, source / WEIGHTS)
    return denoiser, source


def read_raw(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of the denoiser itself in a training checkpoint, which also has those of the heads."""
    prefix, tensors = "denoiser.", read_tensors(checkpoint / WEIGHTS)[0]
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def lora_of(folder: Path) -> LoraSection:
    """By what the adapters were trained whose merged average is in `folder`; a UserError if its recipe has none."""
    file = folder / "recipe.yaml"
    lora = load_training_recipe(file, only_read=True).train.lora if file.is_file() else None
    if lora is None:
        raise UserError(f"{folder} has no recipe.yaml with train.lora, so it has no adapters")
    return lora


def _other_weights(ema: Path, name: str) -> Path:
    """The folder of the weights `name` in the checkpoint that the folder `ema` is in."""
    checkpoint = ema.parent
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{ema} has only one set of weights, not the weights '{name}'; leave --weights out")
    there = [RAW, *sorted(file.parent.name for file in checkpoint.glob(f"ema*/{CONFIG}"))]
    if name not in there:
        raise UserError(f"{checkpoint} has no weights '{name}'{did_you_mean(name, there)}")
    raw = [file.name for file in tensor_files(checkpoint / WEIGHTS)] or [""]  # something is missing: look at all
    for part in raw if name == RAW else [name]:
        if damage := find_damage(checkpoint, part):
            raise UserError(f"{checkpoint} is damaged: {damage}")
    return checkpoint if name == RAW else checkpoint / name


def _folder_of(file: Path) -> str:
    """A hint what to name instead of a file."""
    if (file.parent / CONFIG).is_file():
        return f"name its folder, {file.parent}"
    if file.suffix in AUTHORS_FILES:
        return "`dic-repa convert` makes a folder of the authors' weights, to sample from"
    return "name the folder of a run or a checkpoint"


def in_same_run(weak: str) -> bool:
    """Whether a `guidance.weak` is in the run of the model that it guides, not a path or a hub id."""
    return re.fullmatch(r"earlier|0?\.\d+|step_\d+|ema-[^/]+", weak) is not None


def find_weak(weak: str, source: Path) -> str | Path:
    """What to load for the `guidance.weak` of the model whose weights are in `source`: a path or hub id as it is, a
    run's name also beside the model's run.

    Raises:
        UserError: it names another checkpoint or average of the same run, and there is none.
    """
    checkpoint, home = checkpoint_of(source), home_of(source)
    if not in_same_run(weak):
        beside = home.parent / weak
        return beside if not Path(weak).exists() and beside.is_dir() else weak
    if home == checkpoint:
        raise UserError(f"guidance.weak '{weak}': {source} is in no run's folder; name a run or checkpoint instead")
    if weak.startswith("ema-"):
        return _other_weights(checkpoint / "ema", weak)
    found = RunFolder(home).another_checkpoint(weak, checkpoint_step(checkpoint))
    if found is None:
        which = f"{weak} beside it" if weak.startswith("step_") else f"checkpoint before {checkpoint.name}"
        raise UserError(
            f"guidance.weak '{weak}': {home / 'checkpoints'} has no whole {which}; train with train.keep_every to keep "
            "earlier ones, or name another run or checkpoint"
        )
    return found


def weak_weights(settings: SampleSection, source: Path) -> dict[str, str]:
    """The fingerprint of the weaker model that `settings` guide the model in `source` with, if any: its path may hold
    other weights later."""
    weak = settings.guidance and settings.guidance.weak
    return {"weak_weights": weights_fingerprint(weights_folder(find_weak(weak, source)) / WEIGHTS)} if weak else {}
