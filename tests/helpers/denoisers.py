"""Each family of denoisers, small and aligned, for tests in one process and in two."""

from __future__ import annotations

from pathlib import Path

from small_runs import ALIGNED

from dic_repa.recipe import load_recipe
from dic_repa.runs import RunFolder
from dic_repa.training import train

# The model and the tap of digits-urepa that take the place of its own.
DENOISERS = {
    "sit": ("{name: SiT, width: 16, time_scale: 1000, options: {depth: 2, num_heads: 2}}", "blocks.0"),
    "u-vit": ("{name: U-ViT, width: 16, time_scale: 1000, options: {depth: 3, num_heads: 2, size: 16}}", "mid"),
    "dit-llama": ("{name: DiT-LLaMA, width: 16, time_scale: 1000, options: {depth: 2, num_heads: 2}}", "blocks.0"),
    "diffit": ("{name: DiffiT, width: 16, time_scale: 1000, options: {depth: 2, num_heads: 2, size: 16}}", "blocks.0"),
    "sit-down": (
        "{name: SiT-down, width: 16, depths: [1, 1, 1], time_scale: 1000, options: {num_heads: 2}}",
        "mid.0",
    ),
    "dico": ("{name: DiCo, width: 8, depths: [1, 1, 1, 1, 1], time_scale: 1000}", "mid.0"),
    "fcdm": ("{name: FCDM, width: 8, depths: [1, 1, 1, 1, 1], time_scale: 1000}", "mid.0"),
    "diffusers-unet": (
        "{name: 'diffusers:UNet2DModel', time_scale: 1000, options: {block_out_channels: [8, 16], layers_per_block: 1, "
        "norm_num_groups: 4, down_block_types: [DownBlock2D, AttnDownBlock2D], up_block_types: [AttnUpBlock2D, "
        "UpBlock2D]}}",
        "network.mid_block",
    ),
    "diffusers-pixart": (
        "{name: 'diffusers:PixArtTransformer2DModel', time_scale: 1000, options: {num_attention_heads: 2, "
        "attention_head_dim: 8, num_layers: 2, sample_size: 16, cross_attention_dim: 16, caption_channels: 8}}",
        "network.transformer_blocks.0",
    ),
}
KEYS = [key for key in ALIGNED if not key.startswith("model.")]
STEPS = ["train.steps=20", "train.checkpoint_every=10", "train.batch_size=8"]


def denoiser_run(path: Path, name: str, *overrides: str, **options) -> RunFolder:
    """20 steps of two images a pass and process, with a checkpoint after 10."""
    model, tap = DENOISERS[name]
    keys = [*KEYS, *STEPS, f"model={model}", f"alignments.0.tap={tap}", "train.micro_batch=4", *overrides]
    return train(load_recipe("digits-urepa", keys), path, **options)
