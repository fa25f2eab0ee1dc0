"""Train a diffusion model with Lightning, aligned to a vision encoder by a callback.

python examples/lightning_module.py                # the digits that come with dic-repa
python examples/lightning_module.py --no-align     # the same weights, images and noise, without alignment
python examples/lightning_module.py --images pictures --size 64 --width 128 --encoder dinov2-vit-b
"""

from pathlib import Path

import click
import lightning
import torch
from diffusers import UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.functional import convert_image_dtype
from torchvision.utils import save_image

from dic_repa import Aligner
from dic_repa.data import Digits, ImageFolder, resize
from dic_repa.samplers import sample_ode


class Align(lightning.Callback):
    """Gives a module with a `unet` its `aligner` for the time of training; the options are those of `Aligner`."""

    def __init__(self, **options):
        self.options = options

    def setup(self, trainer, module, stage):
        # A submodule: so Lightning moves, wraps and saves the heads, and the optimizer, which is made later, gets them.
        module.aligner = Aligner(module.unet, **self.options)

    def on_train_batch_end(self, trainer, module, *_):
        self.log_dict(module.aligner.logs)

    def teardown(self, trainer, module, stage):
        module.aligner.remove()
        module.aligner = None


class Diffusion(lightning.LightningModule):
    """Flow matching with a U-Net of diffusers; `load_from_checkpoint(path, strict=False)` leaves the heads out."""

    def __init__(self, channels=1, size=16, width=32, learning_rate=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.unet = UNet2DModel(
            size, channels, channels, block_out_channels=(width, 2 * width, 4 * width), layers_per_block=1,
            down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3, norm_num_groups=8,
        )  # fmt: skip
        self.aligner = None

    def forward(self, x, t):
        return self.unet(x, 1000 * t).sample

    def training_step(self, batch, index):
        pictures = convert_image_dtype(batch["image"])  # in [0, 1], for the encoder
        clean = resize(pictures, self.hparams.size) * 2 - 1  # in [-1, 1], for the U-Net
        noise, t = torch.randn_like(clean), torch.randn(len(clean), 1, 1, 1, device=self.device).sigmoid()
        loss = F.mse_loss(self((1 - t) * clean + t * noise, t.flatten()), noise - clean)
        self.log("denoising", loss, prog_bar=True)
        if self.aligner is not None:
            loss = loss + self.aligner(pictures, t.flatten(), step=self.global_step)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.learning_rate)


@click.command(help=__doc__.splitlines()[0])
@click.option("--images", type=click.Path(exists=True), help="A folder of images instead of the digits.")
@click.option("--size", default=16, help="Height and width of what the U-Net learns.")
@click.option("--width", default=32, help="Channels of the U-Net's first level.")
@click.option("--steps", default=1000)
@click.option("--batch-size", default=64)
@click.option("--align/--no-align", default=True)
@click.option("--encoder", help="By default digits-vit, for a folder efficientnet-lite0; with network dinov2-vit-b.")
@click.option("--seed", default=0)
@click.option("--out", default="runs/lightning", type=Path)
def main(images, size, width, steps, batch_size, align, encoder, seed, out):
    lightning.seed_everything(seed)
    data = ImageFolder(images, size, flip=True, unlabelled=True) if images else Digits()
    channels, image_size, _ = data[0]["image"].shape
    module = Diffusion(channels, size, width)
    encoder = encoder or ("efficientnet-lite0" if images else "digits-vit")
    alignment = {"encoder": encoder, "tap": "mid_block", "head_options": {"hidden": 256}}
    example = (torch.zeros(1, channels, size, size), torch.zeros(1))
    callbacks = [Align(alignments=[alignment], image_size=image_size, example=example)] if align else []
    logger = lightning.pytorch.loggers.CSVLogger(out, name="", version="")
    trainer = lightning.Trainer(max_steps=steps, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    trainer.fit(module, DataLoader(data, batch_size, shuffle=True, drop_last=True))
    with torch.no_grad():
        samples = sample_ode(module.eval(), torch.randn(32, channels, size, size), steps=10)
    save_image(samples / 2 + 0.5, out / "samples.png")


if __name__ == "__main__":
    main()
