"""`prepare` with an encoder that takes its time, for tests that kill it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dic_repa.data.autoencoders import AutoencoderSpec, load_autoencoder
from dic_repa.data.prepare import Preparation
from dic_repa.data.sources import open_source
from dic_repa.files.claims import Claims


class SlowHalves:
    """Each 2x2 block's mean and standard deviation: real moments, without weights."""

    spec = AutoencoderSpec("halves", 3, 2, (0.0,) * 3, (1.0,) * 3)
    device = "cpu"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        blocks = images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
        return torch.cat([blocks.mean(-1), blocks.std(-1)], dim=1)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, scale_factor=2)


def preparation(source, destination, autoencoder, **options) -> Preparation:
    """Of pictures of 32 px, in small shards; `autoencoder` is one, or the name of one."""
    if isinstance(autoencoder, str):
        autoencoder = load_autoencoder(autoencoder)
    sizes = {"size": 32, "shard_size": 3, "batch_size": 4, "workers": 2}
    return Preparation(open_source(str(source)), Path(destination), autoencoder, **sizes | options)


def run(source, destination, seconds: float, share: bool = False) -> None:
    claims = Claims(Path(destination)) if share else None
    work = preparation(source, destination, SlowHalves(seconds), shard_size=4, claims=claims)
    work.begin()
    work.write_shards()
    work.complete()
