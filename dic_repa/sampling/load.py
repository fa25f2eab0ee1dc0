"""A checkpoint to sample from, found by the path that a user gives: a run, a checkpoint, averaged weights, a repository
on the hub, or a file of public code."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dic_repa.conditions import ClassLabels, Condition, class_labels, condition_of_model
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError
from dic_repa.files.hub import fetch_model, is_hub_id, use_pins
from dic_repa.files.outputs import AUTHORS_FILES
from dic_repa.models import forward_on_meta, load_authors_checkpoint
from dic_repa.models.kernel_choice import set_kernels
from dic_repa.models.pretrained import CONFIG, WEIGHTS, Pretrained
from dic_repa.recipe import Recipe, SampleSection, load_training_recipe
from dic_repa.recipe.build import build_class_names, build_decoder, build_objective, data_traits, import_plugins
from dic_repa.runs.folder import RunFolder, suggest_runs
from dic_repa.runtime.progress import warn
from dic_repa.sampling.editing import Editing
from dic_repa.sampling.sampler import Sampler, check_sampling
from dic_repa.sampling.weights import find_weak, home_of, read_weights, weights_folder
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

    @property
    def learnt_null(self) -> bool:
        """Whether guidance has a null class to move away from: one that was trained, and not by a model that has learnt
        guidance itself."""
        labelled = self.condition.kind != "none" and self.recipe.train.label_dropout not in (0, 1)
        return labelled and not getattr(build_objective(self.recipe.objective), "guided", False)

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
    set_kernels(denoiser, recipe.model.kernels)
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
    set_kernels(denoiser, recipe.model.kernels)
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
