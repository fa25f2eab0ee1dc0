"""Train a U-Net in plain PyTorch by flow matching, aligned to a vision encoder.

python examples/plain_unet.py                    # the emoji that come with dic-repa
python examples/plain_unet.py --no-align         # the same weights, images and noise, without alignment
python examples/plain_unet.py --images pictures --size 64 --encoder dinov2-vit-b
"""

from itertools import count
from pathlib import Path

import click
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import trange

from dic_repa import Aligner
from dic_repa.data import Emoji, ImageFolder
from dic_repa.samplers import sample_ode


class Block(nn.Module):
    """Two convolutions with a shift by the time between them, and the input added."""

    def __init__(self, inputs, channels, time_width):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, channels, 3, padding=1))
        self.last = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.time, self.skip = nn.Linear(time_width, channels), nn.Conv2d(inputs, channels, 1)

    def forward(self, x, time):
        return self.skip(x) + self.last(self.first(x) + self.time(time)[:, :, None, None])


class UNet(nn.Module):
    """From x (B, 3, H, W) and t (B,) to the velocity (B, 3, H, W), over a map of H/4 x W/4."""

    def __init__(self, a):
        super().__init__()
        b, c = 2 * a, 4 * a  # channels of the second and the third level
        self.time = nn.Sequential(nn.Linear(a, c), nn.SiLU(), nn.Linear(c, c), nn.SiLU())
        self.stem, self.last = nn.Conv2d(3, a, 3, padding=1), nn.Conv2d(a, 3, 3, padding=1)
        self.down1, self.down2, self.middle = Block(a, a, c), Block(a, b, c), Block(b, c, c)
        self.up2, self.up1 = Block(c + b, b, c), Block(b + a, a, c)

    def forward(self, x, t):
        angles = t[:, None] * torch.logspace(0, 3, self.time[0].in_features // 2, device=t.device)
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        fine = self.down1(self.stem(x), time)
        coarse = self.down2(F.avg_pool2d(fine, 2), time)
        x = self.middle(F.avg_pool2d(coarse, 2), time)
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2), coarse], dim=1), time)
        return self.last(self.up1(torch.cat([F.interpolate(x, scale_factor=2), fine], dim=1), time))


@click.command(help=__doc__.splitlines()[0])
@click.option("--images", type=click.Path(exists=True), help="A folder of images instead of the emoji.")
@click.option("--size", default=32, help="Height and width of the images.")
@click.option("--width", default=32, help="Channels of the first level, a multiple of 8.")
@click.option("--steps", default=2000)
@click.option("--batch-size", default=32)
@click.option("--align/--no-align", default=True)
@click.option("--encoder", default="efficientnet-lite0", help="With network, dinov2-vit-b.", show_default=True)
@click.option("--seed", default=0)
@click.option("--out", default="runs/plain-unet", type=Path)
def main(images, size, width, steps, batch_size, align, encoder, seed, out):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    data = ImageFolder(images, size, flip=True, unlabelled=True) if images else Emoji(size=size, flip=True)
    unet = UNet(width).to(device)
    if align:
        alignment = {"encoder": encoder, "tap": "middle", "head": "conv", "target": "spatial-norm", "weight": 1.0}
        example = (torch.zeros(1, 3, size, size, device=device), torch.zeros(1, device=device))
        aligner = Aligner(unet, [alignment], image_size=size, example=example)
    optimizer = torch.optim.AdamW([*unet.parameters(), *(aligner.parameters() if align else ())], 1e-3)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    losses = []
    batches = (batch["image"].to(device) / 127.5 - 1 for _ in count() for batch in loader)
    for _, clean in zip(trange(steps), batches):
        noise, t = torch.randn_like(clean), torch.randn(len(clean), 1, 1, 1, device=device).sigmoid()
        loss = F.mse_loss(unet((1 - t) * clean + t * noise, t.flatten()), noise - clean)
        losses.append(loss.item())
        if align:
            loss = loss + aligner(clean / 2 + 0.5, t.flatten())  # reads what the tap kept of the U-Net's pass
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out.mkdir(parents=True, exist_ok=True)
    torch.save(unet.state_dict(), out / "unet.pt")
    with torch.no_grad():
        samples = sample_ode(unet, torch.randn(32, 3, size, size, device=device), steps=10)
    save_image(samples / 2 + 0.5, out / "samples.png")
    return losses


if __name__ == "__main__":
    main()
