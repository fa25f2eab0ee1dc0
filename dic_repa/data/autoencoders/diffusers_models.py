"""Autoencoders of diffusers, from a local folder or a hub id: config.json and safetensors.

Each class here says what one of diffusers has of its own: its latents' shape, how they become the denoiser's data, and
how it is called.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dic_repa.data.autoencoders.base import autoencoders
from dic_repa.data.autoencoders.places import WEIGHTS, Place, opening
from dic_repa.data.autoencoders.spec import AutoencoderSpec
from dic_repa.errors import UserError, first_few
from dic_repa.files.hashing import fingerprint
from dic_repa.limits import check_limit
from dic_repa.models.adapters import quiet_bitsandbytes

quiet_bitsandbytes()  # diffusers imports it, too
FAMILY = "diffusers:"
Values = tuple[float, ...]


class KLAutoencoder:
    """`diffusers.AutoencoderKL`, frozen, in float32: its float16 decoder overflows for some weights."""

    since: ClassVar[str] = "0.31"  # the first diffusers that has it
    stochastic: ClassVar[bool] = True

    def __init__(self, model: Any, spec: AutoencoderSpec):
        self.model = model.float().eval().requires_grad_(False)
        state = model.state_dict()
        weights = (part for key in sorted(state) for part in (key, state[key].float()))
        self.spec = replace(spec, fingerprint=fingerprint(json.dumps([spec.shift, spec.scale]), *weights))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> "KLAutoencoder":
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        posterior = self.model.encode(images.float() * 2 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return self.decode_by(self.model, self.spec.denormalise(x.float()))

    @classmethod
    def decode_by(cls, model: Any, z: Tensor) -> Tensor:
        """Latents z (B, C, h, w) to images in [0, 1], by a `model` of this class in any precision."""
        return cls.images(model, z.to(model.device, model.dtype)).float().clamp(0, 1)

    @staticmethod
    def images(model: Any, z: Tensor) -> Tensor:
        """What the model makes of latents, in [0, 1] but for its errors."""
        return model.decode(z).sample / 2 + 0.5

    @staticmethod
    def shape(config: Mapping[str, Any]) -> tuple[int, int]:
        """Channels of the latents, and pixels of the image's side for one of theirs."""
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    @staticmethod
    def layers(config: Mapping[str, Any]) -> tuple[int, list[int]]:
        """How many blocks it has, and their widths."""
        widths = [*config["block_out_channels"], 2 * config["latent_channels"]]
        return len(config["block_out_channels"]) * config["layers_per_block"], widths

    @staticmethod
    def statistics(config: Mapping[str, Any], read: Callable[[str], Tensor]) -> tuple[Values, Values]:
        """Shift and scale of each channel, or one of all; `read` gives a tensor of the weights."""
        scale, shift = config["scaling_factor"] or 1.0, config.get("shift_factor") or 0.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            return tuple(map(float, config["latents_mean"])), tuple(scale / float(s) for s in config["latents_std"])
        return (shift,), (scale,)


class Flux2Autoencoder(KLAutoencoder):
    """`diffusers.AutoencoderKLFlux2`: 2x2 latents are packed into the channels of one, as FLUX.2's denoiser sees them.

    A channel c at (y, x) of the square becomes channel 4c + 2y + x. The running statistics of a batch norm, in the
    weights, are shift and scale.
    """

    since = "0.36"

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        mean, std = super().encode(images).chunk(2, dim=1)
        side = self.model.config.patch_size[0]
        return torch.cat([pixel_unshuffle(mean, side), pixel_unshuffle(std, side)], dim=1)

    @staticmethod
    def images(model: Any, z: Tensor) -> Tensor:
        return KLAutoencoder.images(model, pixel_shuffle(z, model.config.patch_size[0]))

    @staticmethod
    def shape(config: Mapping[str, Any]) -> tuple[int, int]:
        channels, downsample = KLAutoencoder.shape(config)
        rows, columns = config["patch_size"]
        if rows != columns:
            raise ValueError(f"its patch_size {rows}x{columns} is no square")
        return channels * rows**2, downsample * rows

    @staticmethod
    def layers(config: Mapping[str, Any]) -> tuple[int, list[int]]:
        blocks, widths = KLAutoencoder.layers(config)
        return blocks, [*widths, *(config.get("decoder_block_out_channels") or [])]

    @staticmethod
    def statistics(config: Mapping[str, Any], read: Callable[[str], Tensor]) -> tuple[Values, Values]:
        variance = read("bn.running_var").double() + config["batch_norm_eps"]
        return tuple(read("bn.running_mean").tolist()), tuple(variance.rsqrt().tolist())


class DCAutoencoder(KLAutoencoder):
    """`diffusers.AutoencoderDC`: a latent for 32x32 pixels or more, and no posterior."""

    since = "0.32"
    stochastic = False

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images.float() * 2 - 1).latent

    @staticmethod
    def shape(config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)

    @staticmethod
    def layers(config: Mapping[str, Any]) -> tuple[int, list[int]]:
        blocks = sum(config["encoder_layers_per_block"]) + sum(config["decoder_layers_per_block"])
        widths = [*config["encoder_block_out_channels"], *config["decoder_block_out_channels"]]
        return blocks, [*widths, config["latent_channels"]]


class RAEAutoencoder(KLAutoencoder):
    """`diffusers.AutoencoderRAE`: a vision encoder's tokens as latents, and a decoder for them, of one image size.

    The model normalises its latents itself, by channel and position. There is no posterior.
    """

    since = "0.37"
    stochastic = False

    @property
    def image_size(self) -> int:
        return self.model.decoder_image_size

    def encode(self, images: Tensor) -> Tensor:
        size, (height, width) = self.image_size, images.shape[-2:]
        if (height, width) != (size, size):  # which it would resize without a word
            raise UserError(
                f"the autoencoder {self.spec.name} takes images of {size}x{size}, not {width}x{height}; prepare them "
                f"with --size {size}"
            )
        with torch.no_grad():
            return self.model.encode(images.float()).latent

    @staticmethod
    def images(model: Any, z: Tensor) -> Tensor:
        side = model.decoder_image_size // model.decoder_patch_size
        if tuple(z.shape[-2:]) != (side, side):
            raise UserError(f"its decoder takes latents of {side}x{side}, not {z.shape[-1]}x{z.shape[-2]}")
        return model.decode(z).sample

    @staticmethod
    def shape(config: Mapping[str, Any]) -> tuple[int, int]:
        check_limit("size", config["encoder_input_size"], "the size of the images of the autoencoder's encoder")
        if not config["reshape_to_2d"]:
            raise ValueError("its latents are no grid: reshape_to_2d is false")
        return config["encoder_hidden_size"], config["patch_size"]

    @staticmethod
    def layers(config: Mapping[str, Any]) -> tuple[int, list[int]]:
        blocks = config["encoder_num_hidden_layers"] + config["decoder_num_hidden_layers"]
        widths = ("encoder_hidden_size", "decoder_hidden_size", "decoder_intermediate_size")
        return blocks, [config[name] for name in widths]

    @staticmethod
    def statistics(config: Mapping[str, Any], read: Callable[[str], Tensor]) -> tuple[Values, Values]:
        return (0.0,), (1.0,)


KINDS: dict[str, type[KLAutoencoder]] = {
    "AutoencoderKL": KLAutoencoder,
    "AutoencoderKLFlux2": Flux2Autoencoder,
    "AutoencoderDC": DCAutoencoder,
    "AutoencoderRAE": RAEAutoencoder,
}


@autoencoders.register(FAMILY)
def diffusers_autoencoder(name: str) -> KLAutoencoder:
    """An autoencoder of diffusers by class and place: diffusers:AutoencoderDC:PLACE, a folder or a hub id."""
    return open_diffusers(FAMILY + name)


def open_diffusers(name: str, **given: Any) -> KLAutoencoder:
    """The autoencoder `name`: a folder or hub id, or 'diffusers:CLASS:' and then one. `given` replaces what its config
    says."""
    place, kind = _place_and_kind(name)
    with opening(place, kind) as options:
        spec = _read_spec(name, place, kind, options, given)  # before it is built
        model, found = _class_of(kind).from_pretrained(**options, use_safetensors=True, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its weights lack {len(missing)} tensors, such as {first_few(missing, 2)}")
    return KINDS[kind](model, spec)


def read_diffusers_spec(name: str) -> AutoencoderSpec:
    """The spec of the same, without its weights."""
    place, kind = _place_and_kind(name)
    with opening(place, kind) as options:
        return _read_spec(name, place, kind, options, {})


def make_spec(
    name: str, kind: str, config: Mapping[str, Any], read: Callable[[str], Tensor] = lambda tensor: torch.zeros(0)
) -> AutoencoderSpec:
    """The spec of a `kind` with a `config` in which nothing is left out, if it is one that can be built."""
    own = KINDS[kind]
    (blocks, widths), (channels, downsample) = own.layers(config), own.shape(config)
    check_limit("blocks", blocks, f"the number of blocks of the autoencoder {name}")
    largest = 4 * 9 * max(widths) ** 2  # bytes of a convolution
    check_limit("memory", largest, f"the size of a layer of the autoencoder {name} in bytes")
    shift, scale = (v * channels if len(v) == 1 else v for v in own.statistics(config, read))
    spec = AutoencoderSpec(name, channels, downsample, shift, scale, stochastic=own.stochastic)
    return AutoencoderSpec.from_dict(spec.to_dict())


def defaults(kind: str) -> dict[str, Any]:
    """What diffusers takes for what a config leaves out."""
    parameters = inspect.signature(_class_of(kind).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _read_spec(name: str, place: Place, kind: str, options: dict[str, Any], given: dict[str, Any]) -> AutoencoderSpec:
    from safetensors import safe_open

    def read(tensor: str) -> Tensor:
        with safe_open(place.file(WEIGHTS), framework="pt") as file:
            return file.get_tensor(tensor)

    config = defaults(kind) | dict(_load_config(options)) | given
    full_name = f"{FAMILY}{kind}:{place}" if name.startswith(FAMILY) else str(place)
    return make_spec(full_name, kind, config, read)


def _load_config(options: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL  # any class reads any config

    return AutoencoderKL.load_config(**options)


def _place_and_kind(name: str) -> tuple[Place, str]:
    """Where `name` says that an autoencoder is, and its class: that of `name`, or else that of its config.json."""
    asked, place = "", name
    if name.startswith(FAMILY):
        asked, _, place = name.removeprefix(FAMILY).partition(":")
        _class_of(asked)
        if not place:
            raise UserError(
                f"'{name}' does not say where the weights are; name a folder or a hub id as well, such as {name}:FOLDER"
            )
    where = Place.of(place)
    with opening(where, asked or "AutoencoderKL") as options:
        kind = str(_load_config(options).get("_class_name") or asked or "AutoencoderKL")
    if asked and kind != asked:
        raise UserError(f"{where} holds diffusers' {kind}, not its {asked}; name it as {FAMILY}{kind}:{where}")
    _class_of(kind)
    return where, kind


def _class_of(kind: str) -> Any:
    """diffusers' class, or a UserError that says what is missing."""
    import diffusers

    if kind not in KINDS:
        raise UserError(f"'{kind}' is none of the autoencoders of diffusers that are taken: {', '.join(KINDS)}")
    if not hasattr(diffusers, kind):
        since = KINDS[kind].since
        raise UserError(
            f"diffusers {diffusers.__version__} has no {kind}; it came with {since}: pip install 'diffusers>={since}'"
        )
    if kind == "AutoencoderRAE" and not find_spec("transformers"):
        raise UserError("AutoencoderRAE needs the package transformers, for its encoder: pip install transformers")
    return getattr(diffusers, kind)
