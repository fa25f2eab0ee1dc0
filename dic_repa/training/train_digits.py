"""Train the networks that the digits' recipes need, from scratch, on the 8,000 training digits.

python -m dic_repa.training.train_digits encoder    `digits-vit`, which the denoiser is aligned to
python -m dic_repa.training.train_digits judge      the classifier that scores samples
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import click
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.data.digits import NUM_CLASSES, load_digits, resize
from dic_repa.encoders.digits import HEAD_WIDTH, IMAGE_SIZE, MEAN, STD, build_digits_vit
from dic_repa.evaluation.digits import IMAGE_SIZE as JUDGED_SIZE
from dic_repa.evaluation.digits import DigitsClassifier
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK, check_file
from dic_repa.runtime.progress import progress_bar


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Train the encoder or the judge of digits, and print its accuracy on the held-out digits."""


def training_options(out: str, epochs: int, rate: float, seed: int) -> Callable:
    """The options that both networks have, with their defaults."""
    options = (
        click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=out),
        click.option("--epochs", type=click.IntRange(1), default=epochs),
        click.option("--batch-size", type=click.IntRange(1, 8000), default=64),
        click.option("--lr", type=click.FloatRange(0, min_open=True), default=rate, help="Peak learning rate."),
        click.option("--seed", type=int, default=seed),
    )

    return lambda function: functools.reduce(lambda command, option: option(command), reversed(options), function)


@main.command("encoder")
@training_options("digits_vit.safetensors", epochs=24, rate=2e-3, seed=0)
@click.option("--pixels", type=click.FloatRange(0), default=0.3, help="Weight of the pixel loss.")
@click.option("--embed-dim", type=click.IntRange(HEAD_WIDTH), default=96)
@click.option("--depth", type=click.IntRange(1), default=3)
def train_encoder(pixels: float, embed_dim: int, depth: int, **settings) -> None:
    """A small ViT that gives the digit from the mean of its tokens, and each patch's pixels from its token."""
    if embed_dim % HEAD_WIDTH:
        raise click.BadParameter(f"must be a multiple of {HEAD_WIDTH}", param_hint="--embed-dim")
    torch.manual_seed(settings["seed"])
    config = {"embed_dim": embed_dim, "depth": depth}
    vit = build_digits_vit(**config)
    patch = IMAGE_SIZE // vit.patch_embed.grid_size[0]
    # Both heads are thrown away: they are there to say what a token has to know.
    heads = nn.ModuleDict({"label": nn.Linear(embed_dim, NUM_CLASSES), "pixels": nn.Linear(embed_dim, patch * patch)})
    parameters = [*vit.parameters(), *heads.parameters()]
    decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    others = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.99))

    def tokens_of(images: Tensor) -> Tensor:
        return vit.forward_features((images - MEAN[0]) / STD[0])

    def loss(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        warped = random_warp(images, generator)
        tokens = tokens_of(warped)
        own_pixels = rearrange(warped, "b c (h i) (w j) -> b (h w) (c i j)", i=patch, j=patch)
        label_loss = F.cross_entropy(heads["label"](tokens.mean(dim=1)), labels, label_smoothing=0.1)
        return label_loss + pixels * F.mse_loss(heads["pixels"](tokens), own_pixels)

    def classify(images: Tensor) -> Tensor:
        return heads["label"](tokens_of(images).mean(dim=1))

    fit(vit, parameters, optimizer, loss, classify, {"config": json.dumps(config)}, clip=1.0, rise=0.1, **settings)


@main.command("judge")
@training_options("digits_classifier.safetensors", epochs=20, rate=3e-3, seed=1)
def train_judge(**settings) -> None:
    """A small convolutional classifier that has nothing in common with the encoder."""
    torch.manual_seed(settings["seed"])
    model = DigitsClassifier()

    def loss(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        drawn = soften(random_warp(images, generator), generator)
        return F.cross_entropy(model(drawn), labels, label_smoothing=0.05)

    parameters = [*model.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    fit(model, parameters, optimizer, loss, lambda images: model(resize(images, JUDGED_SIZE)), {}, **settings)


def random_warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each warped by its own random amounts.

    They are rotated by up to 15 degrees, scaled and sheared by up to 0.15, shifted by up to a tenth of the width, and
    bent by a smooth displacement with a standard deviation of 0.03 of the width. Outside the image is black.
    """
    batch = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    angle, shear_x = uniform(math.radians(15)), uniform(0.15)
    scale_x, scale_y = 1 + uniform(0.15), 1 + uniform(0.15)
    cos, sin = angle.cos(), angle.sin()
    # grid_sample's coordinates run from -1 to 1, so a share of the width counts twice.
    rows = [
        torch.stack([cos / scale_x, (shear_x - sin) / scale_y, uniform(2 * 0.1)], dim=1),
        torch.stack([sin / scale_x, cos / scale_y, uniform(2 * 0.1)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    bend = torch.randn(batch, 2, 4, 4, generator=generator) * (2 * 0.03)
    bend = F.interpolate(bend, images.shape[-2:], mode="bicubic", align_corners=False)
    return F.grid_sample(images, grid + rearrange(bend, "b xy h w -> b h w xy"), align_corners=False)


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 1, 28, 28), some blurred or noisy, at the judge's size.

    Samples are a little soft or grainy. A judge trained without this misread 40 % of real digits that had gone through
    10x10 pixels.
    """
    sharpness = int(torch.randint(10, images.shape[-1] + 1, (), generator=generator))
    images = resize(resize(images, sharpness), JUDGED_SIZE)
    strength = 0.06 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def fit(
    model: nn.Module, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Callable,
    classify: Callable, metadata: dict[str, str],
    out: Path, epochs: int, batch_size: int, lr: float, seed: int, clip: float = float("inf"), rise: float = 0.3,
) -> None:  # fmt: skip
    """Train on the training digits, say how many held-out ones are recognised, and write the weights.

    Args:
        parameters: all that are trained: the model's, and of heads that are thrown away.
        loss: of images, labels and a generator.
        classify: images to logits.
        clip: the largest norm of the gradient.
        rise: the share of the steps in which the learning rate rises.
    """
    check_file(out)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_digits("train")
    held_out, digits = load_digits("held-out")
    steps_per_epoch = len(images) // batch_size
    total = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=rise)
    with progress_bar(total=total, unit="step") as bar:
        for epoch in range(epochs):
            model.train()
            for batch in torch.randperm(len(images), generator=generator).split(batch_size)[:steps_per_epoch]:
                optimizer.zero_grad()
                value = loss(images[batch], labels[batch], generator)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                bar.update()
            model.eval()
            with torch.no_grad():
                predicted = torch.cat([classify(part).argmax(dim=1) for part in held_out.split(500)])
            accuracy = (predicted == digits).float().mean().item()
            bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", held_out=f"{accuracy:.2%}")
    metadata |= {"held_out_accuracy": f"{accuracy:.4f}", "seed": str(seed), "made_by": MARK}
    with write_aside(out) as aside:
        save_file(model.state_dict(), aside, metadata)
    print(f"held-out accuracy {accuracy:.2%}; weights in {out}")


if __name__ == "__main__":
    main()
