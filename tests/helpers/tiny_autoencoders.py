"""Tiny autoencoders of diffusers with random weights, of the classes beside AutoencoderKL (`pictures.save_vae`)."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import torch

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL = BLOCKS | {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
DC = {
    "latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.4,
    "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8),
    "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ()),
}  # fmt: skip
RAE = {
    "encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 28, "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "patch_size": 4,
}  # fmt: skip


def make_kind(kind: str):
    """One of the class `kind`; None if this diffusers lacks it."""
    if not hasattr(diffusers, kind):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "AutoencoderDC":
            return diffusers.AutoencoderDC(**DC)
        if kind == "AutoencoderRAE":
            statistics = {"latents_mean": torch.randn(64, 2, 2), "latents_std": torch.rand(64, 2, 2) + 0.5}
            return diffusers.AutoencoderRAE(**RAE, **statistics)
        takes = inspect.signature(diffusers.AutoencoderKLFlux2.__init__).parameters
        narrow = {"decoder_block_out_channels": (4, 8)} if "decoder_block_out_channels" in takes else {}
        model = diffusers.AutoencoderKLFlux2(**SMALL, **narrow)
        model.bn.running_mean.copy_(torch.randn(16))
        model.bn.running_var.copy_(torch.rand(16) + 0.1)
        return model


def save_kind(folder: Path, kind: str) -> Path:
    """Its folder, which is not there if this diffusers lacks the class."""
    if model := make_kind(kind):
        model.save_pretrained(folder)
    return folder
