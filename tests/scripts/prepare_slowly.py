"""`prepare` with an encoder that takes its time, for a test that kills it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.data.prepare import Preparation
from dic_repa.data.sources import open_source


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


def run(source, destination, seconds: float) -> None:
    sizes = {"size": 32, "shard_size": 4, "batch_size": 4, "workers": 2}
    preparation = Preparation(open_source(source), Path(destination), SlowHalves(seconds), **sizes)
    preparation.begin()
    preparation.write_shards()
    preparation.finish()
