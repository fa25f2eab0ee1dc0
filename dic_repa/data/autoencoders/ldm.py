"""Autoencoders in one file, in the layout of CompVis' latent diffusion (LDM): LightningDiT's VA-VAE, REPA-E's E2E-VAE,
MAR's, and Stable Diffusion's own. They are diffusers' AutoencoderKL under other names of the tensors.

Only tensors are read. The architecture is read off their names and shapes; the shift and scale off a file beside them:
`latents_stats.pt` (`mean`, `std`), or `NAME-latents-stats.pt` (`latents_bias`, `latents_scale`) for `NAME.pt`.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dic_repa.data.autoencoders.diffusers_models import KLAutoencoder, defaults, make_spec
from dic_repa.data.autoencoders.places import Place
from dic_repa.errors import UserError, first_few, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.weights import read_tensors, save_tensors

FILE_ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors")
# What training leaves in such a file: losses and a discriminator, and VA-VAE's vision encoder and projection.
FOREIGN = ("loss.", "foundation_model.", "linear_proj.")
_STATISTICS = ("{}-latents-stats.pt", "latents_stats.pt")
# Parts of diffusers' names and LDM's, in the order in which they are replaced.
_NAMES = {
    "down_blocks.": "down.", ".resnets.": ".block.", ".attentions.": ".attn.", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def is_ldm_file(name: str) -> bool:
    """Whether `name` is that of a file, here or on the hub, and not of a folder."""
    return name.endswith(FILE_ENDINGS) and not Path(name).is_dir()


def open_ldm(name: str) -> KLAutoencoder:
    """The autoencoder in a file, `FOLDER/FILE` or `OWNER/NAME:FILE` on the hub.

    Raises:
        UserError: no such file, or one in another layout, or statistics that do not fit it.
    """
    place = Place.of(name)
    file = _file(place)
    tensors = read_ldm(file)
    config = ldm_config(tensors, file) | read_statistics(file)
    where = str(place) if _is_remote(place) else str(file.resolve())
    try:
        spec = make_spec(where, "AutoencoderKL", defaults("AutoencoderKL") | config)
        model = _build(config, tensors, file)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        raise UserError(f"{file} holds no autoencoder that diffusers can build ({first_line(error)})") from None
    return KLAutoencoder(model, spec)


def read_ldm(file: Path) -> dict[str, Tensor]:
    """The tensors of an autoencoder's file without what belongs to its training."""
    return {key: value for key, value in read_tensors(file)[0].items() if not key.startswith(FOREIGN)}


def is_ldm(tensors: Mapping[str, Any]) -> bool:
    """Whether these are an autoencoder's tensors in LDM's layout."""
    return {"encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"} <= set(tensors)


def ldm_config(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The config of the AutoencoderKL whose `tensors` these are. Norms have 32 groups, as all of LDM's have."""
    if not is_ldm(tensors):
        raise UserError(
            f"{file} is no autoencoder in LDM's layout: it has no encoder.down.0.block.0 or no decoder.conv_in; one of "
            "diffusers is named by its folder"
        )
    levels = range(_count(tensors, "encoder.down."))
    attention = {
        side: [f"{side}.{n}.attn.0.q.weight" in tensors for n in levels] for side in ("encoder.down", "decoder.up")
    }
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0] if "decoder.conv_out.weight" in tensors else 3,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [_width(tensors, n) for n in levels],
        "layers_per_block": _count(tensors, "encoder.down.0.block."),
        "down_block_types": ["Attn" * has + "DownEncoderBlock2D" for has in attention["encoder.down"]],
        "up_block_types": ["Attn" * has + "UpDecoderBlock2D" for has in reversed(attention["decoder.up"])],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "scaling_factor": 1.0,
    }


def ldm_name(name: str, levels: int) -> str:
    """LDM's name of an AutoencoderKL's tensor; `levels` is how many resolutions it has: LDM counts the decoder's from
    the finest, diffusers from the coarsest.
    """
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for theirs, ldm in _NAMES.items():
        name = name.replace(theirs, ldm)
    return name


def read_statistics(file: Path) -> dict[str, list[float]]:
    """`latents_mean` and `latents_std` from the file of statistics beside an autoencoder's; {} if there is none."""
    for pattern in _STATISTICS:
        beside = file.with_name(pattern.format(file.stem))
        if beside.is_file():
            found = {key: value.flatten().double() for key, value in read_tensors(beside)[0].items()}
            if {"mean", "std"} <= set(found):
                mean, std = found["mean"], found["std"]
            elif {"latents_bias", "latents_scale"} <= set(found):
                mean, std = found["latents_bias"], 1 / found["latents_scale"]
            else:
                raise UserError(
                    f"{beside} has neither mean and std nor latents_bias and latents_scale; move it away to do without"
                )
            return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    return {}


def write_ldm(autoencoder: KLAutoencoder, file: Path) -> None:
    """Write an AutoencoderKL into `file` in LDM's layout, and its shift and scale into a file beside it, as REPA-E
    does: `NAME-latents-stats.pt`."""
    spec, model = autoencoder.spec, autoencoder.model
    levels = len(model.config.block_out_channels)
    tensors = {}
    for name, tensor in model.state_dict().items():
        is_attention = tensor.ndim == 2  # a linear layer here, a convolution of 1x1 there
        tensors[ldm_name(name, levels)] = tensor[..., None, None] if is_attention else tensor
    shape = (1, spec.channels, 1, 1)
    statistics = {
        "latents_scale": torch.tensor(spec.scale).view(shape), "latents_bias": torch.tensor(spec.shift).view(shape)
    }  # fmt: skip
    for content, path in ((tensors, file), (statistics, file.with_name(_STATISTICS[0].format(file.stem)))):
        with write_aside(path) as aside:
            if path.suffix == ".safetensors":
                save_tensors(content, aside)
            else:
                with aside.open("wb") as stream:  # with a path, torch would hide a disk's error
                    torch.save({key: value.detach().cpu().contiguous() for key, value in content.items()}, stream)


def _is_remote(place: Place) -> bool:
    return place.is_hub_id and bool(place.inner)  # 'weights/vae.pt' alone reads like a hub id, and is a file here


def _file(place: Place) -> Path:
    """The file that `place` names; of one on the hub, with its statistics beside it."""
    if not _is_remote(place):
        return Path(place.root, place.inner)
    folder, _, name = place.inner.rpartition("/")
    inside = Place(place.root, folder)
    statistics = [pattern.format(Path(name).stem) for pattern in _STATISTICS]
    try:
        file = inside.file(name)
        for each in statistics:
            _fetch_if_there(inside, each)
    except Exception as error:  # the hub's client raises a dozen kinds
        files = f"{name} (and {' or '.join(statistics)}, if it is there)"
        raise inside.fault(error, files, "LDM", named="file") from None
    return file


def _fetch_if_there(place: Place, name: str) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # Without a network it was fetched with the weights, or is not there.
    with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
        place.file(name)


def _build(config: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> Any:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model: Any = AutoencoderKL(**config)
    own = {ldm_name(name, len(config["block_out_channels"])): (name, t.shape) for name, t in model.state_dict().items()}
    fitting = {name: own[name] for name in own if name in tensors and tensors[name].numel() == own[name][1].numel()}
    faults = {
        "missing": [name for name in own if name not in tensors],
        "left over": [name for name in tensors if name not in own],
        "of another shape": [name for name in own if name in tensors and name not in fitting],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {fault}: {first_few(names, 5)}" for fault, names in faults.items() if names)
        raise UserError(f"its tensors are not those of an autoencoder; {told}")
    state = {name: tensors[ldm].reshape(shape) for ldm, (name, shape) in fitting.items()}
    model.load_state_dict(state, assign=True)
    return model


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers, from 0, follow `prefix` in the names."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return len({found[1] for key in tensors if (found := pattern.match(key))})


def _width(tensors: Mapping[str, Tensor], level: int) -> int:
    """The channels of a level; 0 where its tensors are not there, which the check of all names then says."""
    weight = tensors.get(f"encoder.down.{level}.block.0.conv1.weight")
    return 0 if weight is None else weight.shape[0]
