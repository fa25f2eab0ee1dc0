"""Train diffusers' DiTTransformer2DModel with classes by flow matching, as a SiT, aligned to a vision encoder (REPA).

python examples/dit.py                           # the digits that come with dic-repa
python examples/dit.py --no-align                # the same weights, images and noise, without alignment
python examples/dit.py --images pictures --size 64 --patch 4 --depth 12 --encoder dinov2-vit-b
"""

from itertools import count
from pathlib import Path

import click
import torch
from diffusers import DiTTransformer2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.functional import convert_image_dtype
from torchvision.utils import save_image
from tqdm import trange

from dic_repa import Aligner
from dic_repa.data import Digits, ImageFolder, resize
from dic_repa.samplers import sample_ode


@click.command(help=__doc__.splitlines()[0])
@click.option("--images", type=click.Path(exists=True), help="A folder with a folder of images for each class.")
@click.option("--size", default=16, help="Height and width of what the DiT learns.")
@click.option("--patch", default=2, help="Pixels of a token's side.")
@click.option("--depth", default=6, help="Blocks.")
@click.option("--heads", default=4, help="Attention heads, 32 channels each.")
@click.option("--steps", default=2000)
@click.option("--batch-size", default=64)
@click.option("--learning-rate", default=1e-3)
@click.option("--align/--no-align", default=True)
@click.option("--encoder", help="By default digits-vit, for a folder efficientnet-lite0; with network dinov2-vit-b.")
@click.option("--sampling-steps", default=10)
@click.option("--seed", default=0)
@click.option("--out", default="runs/dit", type=Path)
def main(
    images, size, patch, depth, heads, steps, batch_size, learning_rate, align, encoder, sampling_steps, seed, out
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    data = ImageFolder(images, size) if images else Digits()
    channels, image_size, _ = data[0]["image"].shape
    classes = len(data.class_names)
    dit = DiTTransformer2DModel(
        heads, 32, channels, num_layers=depth, sample_size=size, patch_size=patch, num_embeds_ada_norm=classes
    ).to(device)
    parameters = [*dit.parameters()]
    if align:
        alignment = {
            "encoder": encoder or ("efficientnet-lite0" if images else "digits-vit"),
            "tap": f"transformer_blocks.{depth // 3 - 1}",  # after a third of the blocks, as in REPA
            "manifold_weight": 0.0,  # U-REPA's second term, which is for U-Nets
            "head_options": {"hidden": 256},  # as small as the DiT; without it 2048, as in the paper
        }
        x = torch.zeros(1, channels, size, size, device=device)
        example = {"hidden_states": x, "timestep": x[:, 0, 0, 0], "class_labels": x[:, 0, 0, 0].long()}
        aligner = Aligner(dit, [alignment], image_size=image_size, example=example)
        parameters += aligner.parameters()
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)

    losses = []
    batches = (batch for _ in count() for batch in loader)
    for _, batch in zip(trange(steps), batches):
        pictures = convert_image_dtype(batch["image"]).to(device)  # in [0, 1], for the encoder
        clean = resize(pictures, size) * 2 - 1  # in [-1, 1], for the DiT
        noise, t = torch.randn_like(clean), torch.randn(len(clean), 1, 1, 1, device=device).sigmoid()
        velocity = dit((1 - t) * clean + t * noise, 1000 * t.flatten(), batch["label"].to(device)).sample
        loss = F.mse_loss(velocity, noise - clean)
        losses.append(loss.item())
        if align:
            loss = loss + aligner(pictures, t.flatten())  # reads what the tap kept of the DiT's pass
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    dit.save_pretrained(out)
    dit.eval()  # which also ends the dropout of classes
    labels = torch.arange(classes, device=device).repeat(8)
    noise = torch.randn(len(labels), channels, size, size, device=device)
    with torch.no_grad():
        samples = sample_ode(lambda x, t: dit(x, 1000 * t, labels).sample, noise, steps=sampling_steps)
    save_image(samples / 2 + 0.5, out / "samples.png", nrow=classes)
    return losses


if __name__ == "__main__":
    main()
