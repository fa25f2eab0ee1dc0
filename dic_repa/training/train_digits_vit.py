"""Train `digits-vit` on the 8,000 training digits, from scratch: `python -m dic_repa.training.train_digits_vit`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from einops import rearrange
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.data.digits import NUM_CLASSES, load_digits
from dic_repa.encoders.digits import HEAD_WIDTH, IMAGE_SIZE, MEAN, STD, build_digits_vit, random_warp
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK, check_file
from dic_repa.runtime.progress import progress_bar


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("digits_vit.safetensors"), show_default=True
)
@click.option("--epochs", type=click.IntRange(1), default=24, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 8000), default=64, show_default=True)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True, help="Peak learning rate."
)
@click.option("--pixels", type=click.FloatRange(0), default=0.3, show_default=True, help="Weight of the pixel loss.")
@click.option("--embed-dim", type=click.IntRange(HEAD_WIDTH), default=96, show_default=True)
@click.option("--depth", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    out: Path, epochs: int, batch_size: int, lr: float, pixels: float, embed_dim: int, depth: int, seed: int
) -> None:
    """Train the digit encoder and print its accuracy on the held-out digits."""
    check_file(out)
    if embed_dim % HEAD_WIDTH:
        raise click.BadParameter(f"must be a multiple of {HEAD_WIDTH}", param_hint="--embed-dim")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = {"embed_dim": embed_dim, "depth": depth}
    vit = build_digits_vit(**config)
    images, labels = load_digits("train")

    grid = vit.patch_embed.grid_size[0]
    patch = IMAGE_SIZE // grid
    # Both read-outs are thrown away: they are there to say what a token has to know.
    heads = nn.ModuleDict({"label": nn.Linear(embed_dim, NUM_CLASSES), "pixels": nn.Linear(embed_dim, patch * patch)})
    parameters = [*vit.parameters(), *heads.parameters()]
    decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    others = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], betas=(0.9, 0.99))
    steps_per_epoch = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps_per_epoch, pct_start=0.1)

    progress = progress_bar(total=epochs * steps_per_epoch, unit="step")
    for epoch in range(epochs):
        vit.train()
        for batch in torch.randperm(len(images), generator=generator).split(batch_size)[:steps_per_epoch]:
            warped = random_warp(images[batch], generator)
            tokens = vit.forward_features(normalise(warped))
            logits = heads["label"](tokens.mean(dim=1))
            own_pixels = rearrange(warped, "b c (h i) (w j) -> b (h w) (c i j)", i=patch, j=patch)
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            loss = loss + pixels * F.mse_loss(heads["pixels"](tokens), own_pixels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update()
        accuracy = held_out_accuracy(vit, heads["label"])
        progress.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", held_out=f"{accuracy:.2%}")
    progress.close()

    metadata = {"config": json.dumps(config), "held_out_accuracy": f"{accuracy:.4f}", "seed": str(seed)}
    with write_aside(out) as aside:
        save_file(vit.state_dict(), aside, metadata | {"made_by": MARK})
    print(f"held-out accuracy {accuracy:.2%}, from the mean token of the last block; weights in {out}")


def normalise(images: Tensor) -> Tensor:
    return (images - MEAN[0]) / STD[0]


@torch.no_grad()
def held_out_accuracy(vit: VisionTransformer, head: nn.Module) -> float:
    vit.eval()
    images, labels = load_digits("held-out")
    logits = torch.cat([head(vit.forward_features(normalise(part)).mean(dim=1)) for part in images.split(500)])
    return (logits.argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
