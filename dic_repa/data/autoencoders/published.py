"""Published autoencoders by short names, as a table of data. What a source states of them is known without their files.

The weights come from the hub, or from where they were put by hand. `scaling_factor` and `shift_factor` are given where
a source states one number for all channels, and then count, whatever the weights' own config says. Where they are None,
they lie in the weights, per channel: until these are here, the shift is 0 and the scale 1.

DC-AE's factors are those with which its authors train (mit-han-lab/efficientvit). Whether the config.json of the
"in-1.0" weights has them was not seen, so they are given here; `latent.normalise: per-channel` needs none.
A licence is given where the weights' page or their authors state it.
"""

from dataclasses import dataclass
from functools import partial

from dic_repa.data.autoencoders.base import AutoencoderCard, autoencoders
from dic_repa.data.autoencoders.diffusers_models import FAMILY, KINDS, KLAutoencoder, open_diffusers
from dic_repa.data.autoencoders.ldm import is_ldm_file, open_ldm
from dic_repa.data.autoencoders.spec import AutoencoderSpec
from dic_repa.errors import UserError


@dataclass(frozen=True)
class Published(AutoencoderCard):
    """A row of the table; `source` is a hub id, with the subfolder or the file behind a colon."""

    description: str
    kind: str = "AutoencoderKL"  # diffusers' class
    scaling_factor: float | None = None
    shift_factor: float = 0.0

    def spec(self, name: str) -> AutoencoderSpec:
        """What is known without the weights."""
        shift, scale = (self.shift_factor,) * self.channels, (self.scaling_factor or 1.0,) * self.channels
        return AutoencoderSpec(
            name, self.channels, self.downsample, shift, scale, stochastic=KINDS[self.kind].stochastic
        )


_PAGE = "see its page"
_SD, _MIT_HAN = "stabilityai/sd-vae-ft", "mit-han-lab/dc-ae"
_RAE = "nyu-visionx/RAE-{}-ViTXL-n08{}"


def _rae(channels: int, parameters: float, encoder: str, what: str, ending: str = "") -> Published:
    description = f"RAE: {what}'s tokens as latents"
    return Published(channels, 16, parameters, _PAGE, _RAE.format(encoder, ending), description, "AutoencoderRAE", 1.0)


def _e2e(channels: int, downsample: int, parameters: float, name: str, what: str) -> Published:
    return Published(channels, downsample, parameters, "MIT", f"REPA-E/e2e-{name}-hf", f"{what}, tuned by REPA-E")


PUBLISHED: dict[str, Published] = {
    "sd-vae-ft-ema": Published(
        4, 8, 83.65, "MIT", f"{_SD}-ema", "Stable Diffusion's, which DiT, SiT, REPA and DiC use", scaling_factor=0.18215
    ),
    "sd-vae-ft-mse": Published(
        4, 8, 83.65, "MIT", f"{_SD}-mse", "the same, trained further for a small squared error", scaling_factor=0.18215
    ),
    "sdxl-vae": Published(4, 8, 83.65, _PAGE, "stabilityai/sdxl-vae", "SDXL's", scaling_factor=0.13025),
    "sdxl-vae-fp16-fix": Published(
        4, 8, 83.65, "MIT", "madebyollin/sdxl-vae-fp16-fix", "SDXL's, made to run in float16", scaling_factor=0.13025
    ),
    "sd3.5-vae": Published(
        16, 8, 83.82, _PAGE, "stabilityai/stable-diffusion-3.5-medium:vae", "Stable Diffusion 3.5's",
        scaling_factor=1.5305, shift_factor=0.0609,
    ),
    "flux1-vae": Published(
        16, 8, 83.82, "Apache-2.0", "black-forest-labs/FLUX.1-schnell:vae", "FLUX.1's",
        scaling_factor=0.3611, shift_factor=0.1159,
    ),
    "flux2-vae": Published(
        128, 16, 84.05, "Apache-2.0", "black-forest-labs/FLUX.2-klein-4B:vae", "FLUX.2's: 32 channels, packed 2x2",
        "AutoencoderKLFlux2",
    ),
    "dc-ae-f32c32": Published(
        32, 32, 323.36, "Apache-2.0", f"{_MIT_HAN}-f32c32-in-1.0-diffusers", "DC-AE of ImageNet", "AutoencoderDC",
        0.3189,
    ),
    "dc-ae-f32c32-sana": Published(
        32, 32, 312.25, _PAGE, f"{_MIT_HAN}-f32c32-sana-1.0-diffusers", "DC-AE of SANA", "AutoencoderDC", 0.41407
    ),
    "dc-ae-f64c128": Published(
        128, 64, 676.9, "Apache-2.0", f"{_MIT_HAN}-f64c128-in-1.0-diffusers", "DC-AE of ImageNet, a latent for 64x64",
        "AutoencoderDC", 0.2889,
    ),
    "va-vae": Published(
        32, 16, 69.84, "MIT", "hustvl/vavae-imagenet256-f16d32-dinov2:vavae-imagenet256-f16d32-dinov2.pt",
        "VA-VAE of LightningDiT, aligned with DINOv2",
    ),
    "e2e-sdvae": _e2e(4, 8, 83.65, "sdvae", "Stable Diffusion's"),
    "e2e-vavae": _e2e(32, 16, 69.84, "vavae", "VA-VAE"),
    "e2e-invae": _e2e(32, 16, 69.84, "invae", "IN-VAE, VA-VAE's network without its alignment"),
    "rae-dinov2-s": _rae(384, 436.7, "dinov2-wReg-small", "DINOv2-S"),
    "rae-dinov2-b": _rae(768, 501.6, "dinov2-wReg-base", "DINOv2-B"),
    "rae-dinov2-b-512": _rae(768, 501.6, "dinov2-wReg-base", "DINOv2-B, for 512x512,", "-i512"),
    "rae-dinov2-l": _rae(1024, 719.7, "dinov2-wReg-large", "DINOv2-L"),
}  # fmt: skip


def open_published(name: str) -> KLAutoencoder:
    """The autoencoder in the row `name`, with one line where its weights cannot be had."""
    row = PUBLISHED[name]
    given = {}
    if row.scaling_factor is not None:
        given = {"scaling_factor": row.scaling_factor, "shift_factor": row.shift_factor}
    try:
        if is_ldm_file(row.source):
            return open_ldm(row.source)
        return open_diffusers(f"{FAMILY}{row.kind}:{row.source}", **given)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


for _name, _row in PUBLISHED.items():
    autoencoders.register(_name, card=_row, description=_row.description)(partial(open_published, _name))
