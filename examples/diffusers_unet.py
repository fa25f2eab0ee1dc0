"""Train diffusers' UNet2DModel without labels, as its train_unconditional.py does, aligned to a vision encoder.

python examples/diffusers_unet.py                       # the digits that come with dic-repa; minutes on a CPU
python examples/diffusers_unet.py --no-align            # the same weights, images and noise, without alignment
python examples/diffusers_unet.py --images pictures --size 64 --width 128 --encoder dinov2-vit-b
accelerate launch --mixed_precision bf16 examples/diffusers_unet.py
"""

from itertools import count, islice
from pathlib import Path

import click
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.functional import convert_image_dtype
from tqdm import tqdm

from dic_repa import Aligner
from dic_repa.data import Digits, ImageFolder, resize


@click.command(help=__doc__.splitlines()[0])
@click.option("--images", type=click.Path(exists=True), help="A folder of images instead of the digits.")
@click.option("--size", default=16, help="Height and width of what the U-Net learns.")
@click.option("--width", default=32, help="Channels of the U-Net's first level.")
@click.option("--steps", default=600)
@click.option("--batch-size", default=64)
@click.option("--accumulate", default=1, help="Batches in a step.")
@click.option("--learning-rate", default=2e-3)
@click.option("--align/--no-align", default=True)
@click.option("--encoder", help="By default digits-vit, for a folder efficientnet-lite0; with network dinov2-vit-b.")
@click.option("--sampling-steps", default=50)
@click.option("--seed", default=0)
@click.option("--out", default="runs/diffusers-unet", type=Path)
def main(images, size, width, steps, batch_size, accumulate, learning_rate, align, encoder, sampling_steps, seed, out):
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    torch.manual_seed(seed + accelerator.process_index)  # noise of its own; DDP spreads the first one's weights
    data = ImageFolder(images, size, flip=True, unlabelled=True) if images else Digits()
    channels, image_size, _ = data[0]["image"].shape
    unet = UNet2DModel(
        size, channels, channels, block_out_channels=(width, 2 * width, 4 * width), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    parameters = [*unet.parameters()]
    if align:
        alignment = {
            "encoder": encoder or ("efficientnet-lite0" if images else "digits-vit"),
            "tap": "mid_block",  # the bottom of the U-Net; dic_repa.alignment.suggest_taps names it for others
            "head_options": {"hidden": 256},  # as small as the U-Net; without it 2048, as in the paper
        }
        example = (torch.zeros(1, channels, size, size), torch.zeros(1))
        aligner = accelerator.prepare(Aligner(unet, [alignment], image_size=image_size, example=example))
        parameters += aligner.parameters()
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    unet, optimizer, schedule, loader = accelerator.prepare(unet, optimizer, schedule, loader)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, power=0.75)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    losses = []
    batches = islice((batch for _ in count() for batch in loader), steps * accumulate)
    for batch in tqdm(batches, total=steps * accumulate):
        pictures = convert_image_dtype(batch["image"])  # in [0, 1], for the encoder
        clean = resize(pictures, size) * 2 - 1  # in [-1, 1], for the U-Net
        noise = torch.randn_like(clean)
        t = torch.randint(1000, (len(clean),), device=clean.device)
        with accelerator.accumulate(*([unet, aligner] if align else [unet])):
            prediction = unet(noising.add_noise(clean, noise, t), t).sample
            loss = F.mse_loss(prediction, noising.get_velocity(clean, noise, t))
            losses.append(loss.item())
            if align:
                loss = loss + aligner(pictures, t / 1000)  # reads what the tap kept of the line above
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                ema.step(unet.parameters())

    ema.copy_to(unet.parameters())
    if accelerator.is_main_process:
        pipeline = DDIMPipeline(accelerator.unwrap_model(unet), noising)
        pipeline.save_pretrained(out)
        samples = pipeline(64, torch.Generator().manual_seed(seed), num_inference_steps=sampling_steps).images
        make_image_grid(samples, 8, 8).save(out / "samples.png")
    return losses


if __name__ == "__main__":
    main()
