"""Train the U-Net of Stable Diffusion or SDXL on captioned images, aligned to a vision encoder.

python examples/stable_diffusion.py                    # a small one without weights, on emoji and their groups
python examples/stable_diffusion.py --xl --no-align    # with SDXL's conditions; the same without alignment
python examples/stable_diffusion.py --weights sdxl-base --images pictures --size 1024 --encoder dinov2-vit-b
"""

from itertools import count, islice

import click
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from dic_repa import Aligner
from dic_repa.data import Emoji, ImageFolder


@torch.no_grad()
def load(folder, captions, device):
    """U-Net, noise schedule, images -> latents, and of each caption the embedding (L, D) and SDXL's pooled one (D,)."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True).to(device)
    pipe.unet.train().enable_gradient_checkpointing()
    once = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    text, _, *rest = pipe.encode_prompt(captions, device=device, **once)
    vae, noising = pipe.vae, DDPMScheduler.from_config(pipe.scheduler.config)
    encode = torch.no_grad()(lambda images: vae.encode(images).latent_dist.sample() * vae.config.scaling_factor)
    return pipe.unet, noising, encode, text, rest[0] if rest else text[:, 0]


def build(xl, captions, device):
    """The same, small and random: the latents are the pixels, and an embedding only tells the captions apart."""
    unet = UNet2DConditionModel(
        32, 3, 3, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time" if xl else None, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )  # fmt: skip
    text = torch.randn(len(captions), 8, 64, generator=torch.Generator().manual_seed(0)).to(device)
    return unet.to(device), DDPMScheduler(), lambda images: images, text, text[:, 0]


@click.command(help=__doc__.splitlines()[0])
@click.option("--weights", type=click.Path(exists=True), help="A folder of Stable Diffusion or SDXL, as of diffusers.")
@click.option("--xl", is_flag=True, help="Without weights: SDXL's conditions.")
@click.option("--images", type=click.Path(exists=True), help="A folder of images, in folders named by their captions.")
@click.option("--size", default=32, help="Height and width of the images.")
@click.option("--steps", default=2000)
@click.option("--batch-size", default=32)
@click.option("--learning-rate", default=5e-4, help="1e-5 with weights.")
@click.option("--align/--no-align", default=True)
@click.option("--encoder", default="efficientnet-lite0", show_default=True, help="With network: dinov2-vit-b.")
@click.option("--seed", default=0)
@click.option("--out", default="runs/stable-diffusion")
def main(weights, xl, images, size, steps, batch_size, learning_rate, align, encoder, seed, out):
    accelerator = Accelerator()
    device = accelerator.device
    torch.manual_seed(seed + accelerator.process_index)  # noise of its own; DDP spreads the first one's weights
    data = ImageFolder(images, size) if images else Emoji(flip=True)
    captions = [*data.class_names, ""]  # the last for classifier-free guidance
    unet, noising, encode, text, pooled = load(weights, captions, device) if weights else build(xl, captions, device)
    sizes = torch.tensor([[size, size, 0, 0, size, size]] * len(captions), device=device)  # of image, corner, crop

    def conditions(rows):
        micro = {"text_embeds": pooled[rows], "time_ids": sizes[rows]}  # SDXL's; Stable Diffusion's U-Net leaves it
        return {"encoder_hidden_states": text[rows], "added_cond_kwargs": micro}

    parameters = [*unet.parameters()]
    if align:
        alignment = {"encoder": encoder, "tap": "mid_block", "head": "conv", "target": "spatial-norm", "weight": 1.0}
        example = {"sample": text.new_zeros(1, unet.config.in_channels, 32, 32), "timestep": 0, **conditions([0])}
        aligner = accelerator.prepare(Aligner(unet, [alignment], image_size=size, example=example))
        parameters += aligner.parameters()
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    losses = []
    for batch in tqdm(islice((batch for _ in count() for batch in loader), steps), total=steps):
        clean = encode(batch["image"] / 127.5 - 1)
        noise, t = torch.randn_like(clean), torch.randint(1000, (len(clean),), device=device)
        rows = batch["label"].where(torch.rand(len(clean), device=device) > 0.1, len(captions) - 1)
        target = noise if noising.config.prediction_type == "epsilon" else noising.get_velocity(clean, noise, t)
        loss = F.mse_loss(unet(noising.add_noise(clean, noise, t), t, **conditions(rows)).sample, target)
        losses.append(loss.item())
        if align:
            loss = loss + aligner(batch["image"], t / 1000)  # the encoder sees the images, not their latents
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.unwrap_model(unet).save_pretrained(out)
    return losses


if __name__ == "__main__":
    main()
