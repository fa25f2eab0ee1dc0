"""Train `lite-vae`, the small autoencoder in the package, from scratch, on the digits and emoji in the package.

python -m dic_repa.training.train_autoencoder

It is a `diffusers.AutoencoderKL` of convolutions alone. The loss is that of latent diffusion's autoencoders (arXiv
2112.10752) without the discriminator: the mean absolute error, a distance of features, and the KL divergence from the
standard normal distribution. The features are EfficientNet-Lite0's, compared as LPIPS does (arXiv 1801.03924), but with
no learnt weights; EfficientNet-Lite2, which judges emoji, has no part in it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dic_repa.data.digits import load_digits, resize
from dic_repa.data.emoji import Emoji
from dic_repa.data.look_back import psnr
from dic_repa.encoders import create_encoder
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import check_folder
from dic_repa.files.pictures import unit_images
from dic_repa.runtime.progress import progress_bar

SIZE = 32  # of the pictures, in pixels
STAGES = (0, 1, 2)  # of EfficientNet-Lite0: 16x16, 8x8 and 4x4 for pictures of 32 px
WIDTHS = (24, 48, 80)  # two halvings: a latent pixel stands for 4x4 pixels
EMA_DECAY = 0.998


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="lite-vae", help="Folder to write.")
@click.option("--steps", type=click.IntRange(2), default=4000)
@click.option("--batch-size", type=click.IntRange(4), default=16, help="A quarter are digits, the others emoji.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=2e-3, help="Peak learning rate.")
@click.option("--perceptual", type=click.FloatRange(0), default=0.1, help="Weight of the distance of features.")
@click.option("--kl", type=click.FloatRange(0), default=1e-6, help="Weight of a picture's KL divergence, in nats.")
@click.option("--seed", type=int, default=0)
def main(out: Path, steps: int, batch_size: int, lr: float, perceptual: float, kl: float, seed: int) -> None:
    """Train the small autoencoder of the package, and print how well it gives held-out pictures back.

    The steps take about 18 minutes on one CPU core.
    """
    if out.exists():
        check_folder(out, "model")
    torch.manual_seed(seed)
    digits, emoji = rgb_digits("train"), Emoji("train", flip=True, shift=2)
    model, _ = fit(build_autoencoder(), digits, emoji, steps, batch_size, lr, perceptual, kl, seed)
    model.register_to_config(scaling_factor=measure_scale(model, [digits, unit_images(emoji.images)]))
    with write_aside(out, "model") as aside:
        model.half().save_pretrained(aside)
    model.float()  # the numbers that were written
    scores = {"digits": rgb_digits("held-out"), "emoji": unit_images(Emoji("held-out").images)}
    found = ", ".join(f"{name} {round_trip_psnr(model, images):.2f} dB" for name, images in scores.items())
    print(f"PSNR of held-out pictures: {found}; weights in {out}")


def fit(
    model: Any, digits: Tensor, emoji: Emoji,
    steps: int, batch_size: int, lr: float, perceptual: float, kl: float, seed: int,
) -> tuple[Any, list[float]]:  # fmt: skip
    """Train the autoencoder; its averaged weights, and the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    distance, losses = feature_distance(), []
    with progress_bar(total=steps, unit="step") as bar:
        for _ in range(steps):
            images = draw(digits, emoji, batch_size, generator)
            posterior = model.encode(images * 2 - 1).latent_dist
            decoded = model.decode(posterior.sample(generator)).sample / 2 + 0.5
            terms = {
                "error": (decoded - images).abs().mean(),
                "features": distance(decoded, images),
                "kl": posterior.kl().mean(),  # summed over a picture's latents
            }
            loss = terms["error"] + perceptual * terms["features"] + kl * terms["kl"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(loss.item())
            bar.set_postfix({name: f"{value:.4f}" for name, value in (terms | {"loss": loss}).items()}, refresh=False)
            bar.update()
    return average.module.eval(), losses


def build_autoencoder() -> Any:
    """The network, with random weights: pictures (B, 3, H, W) to latents (B, 4, H / 4, W / 4)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(WIDTHS),
        up_block_types=["UpDecoderBlock2D"] * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def rgb_digits(split: str) -> Tensor:
    """The digits of a split as pictures (N, 3, 32, 32) in [0, 1]."""
    return resize(load_digits(split)[0], SIZE).expand(-1, 3, -1, -1)


def draw(digits: Tensor, emoji: Emoji, count: int, generator: torch.Generator) -> Tensor:
    """Training pictures (count, 3, 32, 32) in [0, 1], some of them mirrored or moved."""
    share = count // 4
    some = digits[torch.randint(len(digits), (share,), generator=generator)]
    some = torch.where(torch.rand(share, 1, 1, 1, generator=generator) < 0.5, some, some.flip(-1))
    places = torch.randint(len(emoji), (count - share,), generator=generator).tolist()
    return torch.cat([some, unit_images(torch.stack([emoji[place]["image"] for place in places]))])


def feature_distance() -> Callable[[Tensor, Tensor], Tensor]:
    """A function of two batches (B, 3, H, W) in [0, 1]: how far apart EfficientNet-Lite0's unit feature vectors are.

    The squared distance of the vectors at one place, its mean over places and pictures, and the mean over stages.
    """
    encoder: Any = create_encoder("efficientnet-lite0")

    def features(images: Tensor) -> list[Tensor]:
        maps = encoder.model.forward_intermediates(
            encoder.normalise(images), indices=list(STAGES), stop_early=True, intermediates_only=True
        )
        return [F.normalize(each, dim=1) for each in maps]

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = features(b)
        parts = [(x - y).square().sum(dim=1).mean() for x, y in zip(features(a), wanted, strict=True)]
        return torch.stack(parts).mean()

    return distance


@torch.no_grad()
def measure_scale(model: Any, sets: list[Tensor]) -> float:
    """1 / the standard deviation of the latents of these pictures, each set counting alike."""
    latents = [torch.cat([model.encode(part * 2 - 1).latent_dist.mean for part in each.split(100)]) for each in sets]
    mean = torch.stack([each.mean() for each in latents]).mean()
    square = torch.stack([each.square().mean() for each in latents]).mean()
    return 1 / (square - mean**2).sqrt().item()


@torch.no_grad()
def round_trip_psnr(model: Any, images: Tensor) -> float:
    """The mean PSNR of pictures (N, 3, H, W) in [0, 1] after encoding, without noise, and decoding."""
    parts = []
    for part in images.split(100):
        decoded = model.decode(model.encode(part * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        parts.append(psnr(decoded.clamp(0, 1), part))
    return torch.cat(parts).mean().item()


if __name__ == "__main__":
    main()
