"""Stable Diffusion and SDXL in a few thousand random weights, in diffusers' own folders."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 8  # of a text encoder


def save_stable_diffusion(folder: Path, xl: bool = False, **scheduler) -> Path:
    """A pipeline with images of 32 px, latents of 16 px and an alphabet for a vocabulary."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    conditions = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
    }
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH if xl else WIDTH,
        **(conditions if xl else {}),
    )
    schedule = DDIMScheduler(clip_sample=False, steps_offset=1, **scheduler)
    parts = {"vae": vae, "unet": unet, "scheduler": schedule, "tokenizer": _tokenizer(folder)}
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    parts["text_encoder"] = CLIPTextModel(config)
    if xl:
        more = {"tokenizer_2": parts["tokenizer"], "text_encoder_2": CLIPTextModelWithProjection(config)}
        StableDiffusionXLPipeline(**parts, **more).save_pretrained(folder)
    else:
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **off).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
