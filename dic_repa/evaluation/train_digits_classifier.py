"""Train the judge of digits, from scratch: `python -m dic_repa.evaluation.train_digits_classifier`."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.data.digits import load_digits, resize
from dic_repa.encoders.digits import random_warp
from dic_repa.evaluation.digits import IMAGE_SIZE, DigitsClassifier
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK, check_file
from dic_repa.runtime.progress import progress_bar


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("digits_classifier.safetensors"),
    show_default=True,
)
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 8000), default=64, show_default=True)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=3e-3, show_default=True, help="Peak learning rate."
)
@click.option("--seed", type=int, default=1, show_default=True)
def main(out: Path, epochs: int, batch_size: int, lr: float, seed: int) -> None:
    """Train the classifier that judges digits and print its accuracy on the held-out ones."""
    check_file(out)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitsClassifier()
    images, labels = load_digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps_per_epoch = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps_per_epoch)

    progress = progress_bar(total=epochs * steps_per_epoch, unit="step")
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(images), generator=generator).split(batch_size)[:steps_per_epoch]:
            drawn = soften(random_warp(images[batch], generator), generator)
            loss = F.cross_entropy(model(drawn), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
        accuracy = held_out_accuracy(model)
        progress.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", held_out=f"{accuracy:.2%}")
    progress.close()

    metadata = {"held_out_accuracy": f"{accuracy:.4f}", "seed": str(seed), "made_by": MARK}
    with write_aside(out) as aside:
        save_file(model.state_dict(), aside, metadata)
    print(f"held-out accuracy {accuracy:.2%}; weights in {out}")


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 1, 28, 28), some blurred or noisy, at the judge's size.

    Samples are a little soft or grainy. A judge trained without this misread 40 % of real digits that had gone through
    10x10 pixels.
    """
    sharpness = int(torch.randint(10, images.shape[-1] + 1, (), generator=generator))
    images = resize(resize(images, sharpness), IMAGE_SIZE)
    strength = 0.06 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def held_out_accuracy(model: nn.Module) -> float:
    model.eval()
    images, labels = load_digits("held-out")
    predicted = torch.cat([model(resize(part, IMAGE_SIZE)).argmax(dim=1) for part in images.split(500)])
    return (predicted == labels).float().mean().item()


if __name__ == "__main__":
    main()
