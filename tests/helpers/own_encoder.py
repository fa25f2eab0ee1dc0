"""The text of a module with an encoder of one's own."""

ENCODER = '''
import torch
from torch import nn

from dic_repa.encoders import register_encoder


@register_encoder("my-patches")
class Patches(nn.Module):
    """A frozen random projection of 4x4 patches: useless as a teacher, complete as an example."""

    def __init__(self, embed_dim: int = 32):
        super().__init__()
        self.embed_dim = embed_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.project = nn.Conv2d(1, embed_dim, 4, stride=4)

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // 4, size[1] // 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1 or 3, H, W) in [0, 1] to tokens (B, h * w, embed_dim), row by row."""
        return self.project(images.mean(dim=1, keepdim=True)).flatten(2).mT
'''
