"""From a recipe's sections to the things they name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dic_repa.alignment.alignment import Alignment, check_teacher
from dic_repa.conditions import Condition, class_labels, condition_of_data
from dic_repa.data import datasets
from dic_repa.data.autoencoders import AutoencoderSpec, Pixels, load_autoencoder, load_spec, renormalised
from dic_repa.data.autoencoders.spec import PER_CHANNEL, SCALING_FACTOR
from dic_repa.data.latent_files import DEFAULT_AUTOENCODER
from dic_repa.data.latents import LatentDataset, data_shape
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError, first_line
from dic_repa.files.pictures import unit_images
from dic_repa.models import create_denoiser, denoisers
from dic_repa.models.kernel_choice import set_kernels
from dic_repa.models.pretrained import Pretrained
from dic_repa.objectives import objectives
from dic_repa.protocols import Autoencoder, Samples
from dic_repa.recipe import AlignmentSection, DataSection, ModelSection, ObjectiveSection, Recipe
from dic_repa.registry import add_folders, import_plugin
from dic_repa.runtime.progress import detail
from dic_repa.trust import names_code

if TYPE_CHECKING:
    from dic_repa.encoders import Encoder  # timm takes seconds to import


def import_plugins(recipe: Recipe) -> None:
    """Import the modules that the recipe names, which register parts of the user's own."""
    if names_code(recipe.model_dump()):  # else nothing is looked for there
        add_folders(recipe.folders)
    for name in recipe.plugins:
        import_plugin(name)
    denoisers.find(recipe.model.name)  # one of the user's own must be known before a saved one is loaded


def build_dataset(section: DataSection, split: str = "train"):
    """The data set.

    Its samples are dicts of `label`, `image` (if there are images) and `x` or the `moments` that `x` is drawn from. It
    has `channels`, and `num_classes` and `class_names` or another `condition`.
    """
    data, how = _open_dataset(section, split), section._latent.normalise
    if isinstance(data, LatentDataset):
        data.normalise(how)
    elif how != SCALING_FACTOR:
        raise UserError(f"latent.normalise={how}: the data set {section.name} has no latents; leave it out")
    return data


def _open_dataset(section: DataSection, split: str = "train"):
    """The data set as it is, before its latents are normalised."""
    if section.place:
        detail(f"data: {section.place}")
    return datasets.create(section.name, **_data_arguments(section, split))


def normalised_spec(section: DataSection, spec: AutoencoderSpec) -> AutoencoderSpec:
    """The `spec` of the data's autoencoder with the recipe's normalisation; for statistics, the data must be here."""
    how = section._latent.normalise
    if how != PER_CHANNEL:
        return spec.normalised(how)
    data = build_dataset(section)
    if not data.spec.same_weights(spec):
        raise UserError(
            f"the statistics of {section.place} are of the autoencoder {data.spec.name}, not of {spec.name}"
        )
    return spec.normalised(how, data.statistics)


def _data_arguments(section: DataSection, split: str = "train") -> dict[str, Any]:
    """What a data set is made with; a UserError for options that are not its own."""
    given = {"split": split, "size": section.size, "path": section.place, "autoencoder": section.autoencoder}
    given = {key: value for key, value in given.items() if value is not None}
    if twice := sorted(given.keys() & section.options.keys()):
        raise UserError(f"data.options cannot hold {', '.join(twice)}, which a data set is given anyway")
    return {**given, **section.options}


@dataclass(frozen=True)
class DataTraits:
    """What the parts of a recipe need to know of its data. `image_size` is 0 if there are no images."""

    channels: int
    condition: Condition
    image_channels: int
    image_size: int


def data_traits(section: DataSection) -> tuple[DataTraits, str]:
    """The traits of the recipe's data, and why they had to be assumed; '' if the data is on this machine.

    Assumed are ImageNet's 1000 classes, and latents of the recipe's autoencoder or, if it is not here either, Stable
    Diffusion's; of a data set whose class has `class_names`, these and pixels. How latents are normalised changes
    nothing of it, and statistics need not be here.
    """
    arguments, factory = _data_arguments(section), datasets.find(section.name)
    path = inspect.signature(factory).parameters.get("path")
    if path:
        arguments.setdefault("path", "")
    datasets.check_options(section.name, factory, (), arguments)  # a wrong option is no fault of data that is not here
    try:
        data = _open_dataset(section)
        image = data[0].get("image")
    except UserError as error:
        needs_path = path is not None and path.default is path.empty
        if Path(section.place).exists() if section.place else not needs_path:  # it is here, and does not fit
            raise
        names = getattr(factory, "class_names", ())
        spec = load_spec("none" if names else DEFAULT_AUTOENCODER)
        with contextlib.suppress(UserError):  # the autoencoder is not here either
            spec = load_spec(section.autoencoder or spec.name)
        unlabelled = section.options.get("unlabelled")
        assumed = class_labels(0 if unlabelled else section.options.get("num_classes", len(names) or 1000))
        return DataTraits(spec.channels, assumed, 3, spec.downsample * section.size), str(error)
    channels, size = (0, 0) if image is None else (image.shape[0], image.shape[-1])
    return DataTraits(data.channels, condition_of_data(data), channels, size), ""


def build_autoencoder(
    section: DataSection,
    device: torch.device | str = "cpu",
    saved: SavedData | None = None,
    place: str | None = None,
) -> Autoencoder:
    """What turns images into the denoiser's data and back.

    Args:
        saved: What the checkpoint holds about its data; it or `section.autoencoder` spares a look at the data.
        place: Where the autoencoder is now, if it is no longer under its name.

    Raises:
        UserError: The autoencoder is not found, or is not that of `saved`.
    """
    if saved and saved.autoencoder:
        return _saved_autoencoder(saved.autoencoder, device, place)
    own = getattr(datasets.find(section.name), "autoencoder_of", lambda path: "none")
    autoencoder = load_autoencoder(place or section.autoencoder or own(section.place or ""), device)
    return renormalised(autoencoder, normalised_spec(section, autoencoder.spec))


def build_decoder(
    section: DataSection,
    device: torch.device | str = "cpu",
    saved: SavedData | None = None,
    place: str | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function from a batch of the denoiser's data to images in [0, 1]; the arguments are `build_autoencoder`'s."""
    return build_autoencoder(section, device, saved, place).decode


def _saved_autoencoder(spec: AutoencoderSpec, device: torch.device | str, place: str | None) -> Autoencoder:
    if spec.name == "none":
        return Pixels()
    hint = "name its folder with --autoencoder (sample.autoencoder in a recipe)"
    try:
        autoencoder = load_autoencoder(place or spec.name, device)
    except UserError as error:
        raise UserError(f"the model was trained behind the autoencoder {spec.name}; {hint}: {error}") from None
    if not spec.same_weights(autoencoder.spec):
        raise UserError(
            f"the weights of {place or spec.name} are not those of the autoencoder that the model was trained behind "
            f"({spec.name}); {hint}"
        )
    return renormalised(autoencoder, spec)


def build_class_names(section: DataSection, num_classes: int) -> tuple[str, ...]:
    """The classes' names; their numbers if the data set is not on this machine."""
    names = getattr(datasets.find(section.name), "class_names", None)
    if names is None:
        try:
            names = _open_dataset(section).class_names
        except UserError:
            names = range(num_classes)
    return tuple(map(str, names))


def build_denoiser(section: ModelSection, channels: int, condition: Condition) -> Pretrained:
    """The denoiser for data of that many `channels` and that `condition`; a UserError if it does not take them."""
    if twice := sorted(ModelSection.model_fields.keys() & section.options):
        raise UserError(f"model.options: {', '.join(twice)} is a key of its own, model.{twice[0]}")
    # What a recipe leaves at its default is left to the preset: DiT's learns sigma.
    given = section.model_dump(exclude={"name", "options", "kernels"}, exclude_defaults=True)
    denoiser = create_denoiser(section.name, channels, **condition.options(), **given, **section.options)
    set_kernels(denoiser, section.kernels)
    return denoiser


def build_objective(section: ObjectiveSection):
    """The objective; a UserError if it does not take the options."""
    objective = objectives.create(section.name, **section.options)
    try:
        objective.draw((1, 1, 1, 1), torch.Generator())  # an option of the wrong kind may show only here
    except UserError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"objective '{section.name}' does not take these options: {first_line(error)}") from None
    return objective


def build_encoder(section: AlignmentSection, device: torch.device):
    """The frozen encoder of an alignment, on `device`; None if it has none."""
    if section.encoder is None:
        return None
    from dic_repa.encoders import create_encoder  # timm takes seconds to import, and sampling has no use for it

    encoder = create_encoder(section.encoder, **section.encoder_options)
    return encoder.to(device) if isinstance(encoder, nn.Module) else encoder


def build_alignment(
    section: AlignmentSection,
    encoder: Encoder | None,
    denoiser: Pretrained,
    data: Samples,
    device: torch.device | str = "cpu",
) -> Alignment:
    """The head and losses between the denoiser's tap and the encoder, or what the section has in its place, for the
    sizes that `data` has.

    Raises:
        UserError: There are no images, or the encoder's tokens of the first are not the grid that it promises; or the
            section has no teacher that its loss needs.
    """
    if encoder is None or section.encoder is None:
        return join_teacher(section, denoiser, data_shape(data)[1:])
    from dic_repa.encoders import check_tokens

    sample = data[0]
    if "image" not in sample:
        raise UserError("the data has latents but no images, which an encoder needs: train it with `alignments: []`")
    check_tokens(section.encoder, encoder, unit_images(sample["image"][None].to(device)))
    return join_encoder(section, encoder, denoiser, tuple(sample["image"].shape[-2:]), data_shape(data)[1:])


def join_encoder(
    section: AlignmentSection, encoder: Encoder, denoiser: Pretrained, image_size: tuple, size: tuple[int, int]
) -> Alignment:
    """`build_alignment` from sizes alone: (H, W) of the encoder's images and of the denoiser's data."""
    return _join(section, denoiser, size, encoder.embed_dim, encoder.token_grid(image_size))


def join_teacher(section: AlignmentSection, denoiser: Pretrained, size: tuple[int, int]) -> Alignment:
    """The alignment of a section without an encoder, for data of `size` (H, W)."""
    return _join(section, denoiser, size)


def _join(
    section: AlignmentSection,
    denoiser: Pretrained,
    size: tuple[int, int],
    embed_dim: int | None = None,
    grid: tuple[int, int] | None = None,
) -> Alignment:
    own = inspect.signature(Alignment).parameters.keys() | inspect.signature(Alignment.build).parameters.keys()
    if taken := own & section.head_options.keys():
        raise UserError(
            f"alignments: head_options cannot hold {', '.join(sorted(taken))}, which an alignment has itself"
        )
    keys = ("head", "weight", "manifold_weight", "target", "time_weight", "schedule", "loss", "teacher")
    given = {key: getattr(section, key) for key in keys} | section.head_options
    check_teacher(section.tap, section.loss, section.teacher, embed_dim is not None)
    return Alignment.build(denoiser, section.tap, embed_dim, grid, size, **given)
