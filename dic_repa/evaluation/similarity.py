"""How alike two pictures are: SSIM, LPIPS. PSNR is `dic_repa.data.prepare.psnr`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import in_torch_hub
from dic_repa.files.hashing import file_sha256
from dic_repa.files.weights import load_weights, read_tensors

WINDOW, DEVIATION, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, as in its paper
LPIPS_LAYERS = (3, 8, 15, 22, 29)  # of VGG16's `features`: the last ReLU before each pooling


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in [0, 1], (B,): Wang et al. 2004, equation 13.

    The window is Gaussian, 11x11 pixels with a deviation of 1.5; K1 = 0.01, K2 = 0.03, and the range of values is 1. It
    is the mean over the channels, RGB here and not grey, and over all places at which the window lies within the image.

    Raises:
        UserError: the images are smaller than the window.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise UserError(f"SSIM takes images of at least {WINDOW} pixels, not {a.shape[-1]}x{a.shape[-2]}")
    offsets = torch.arange(WINDOW, device=a.device) - WINDOW // 2
    weights = (-(offsets**2) / (2 * DEVIATION**2)).exp()
    row = (weights / weights.sum()).to(a.dtype).expand(a.shape[1], 1, 1, WINDOW)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, row, groups=len(row)), row.mT, groups=len(row))

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    structure = (2 * covariance + K2**2) / (variance_a + variance_b + K2**2)
    return (luminance * structure).flatten(1).mean(dim=1)


class LPIPS(nn.Module):
    """The learned perceptual distance of Zhang et al., arXiv 1801.03924, equation 1: version 0.1, on VGG16.

    Called with two batches of images (B, 3, H, W) in [0, 1], H and W of at least 16, it gives (B,). Its weights for
    VGG16's layers come with the package.

    Args:
        weights: torchvision's file of VGG16 (IMAGENET1K_V1); by default the one in torch's hub folder, `vgg16_file()`.

    Raises:
        UserError: there is no such file, or it holds something else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path | None = None):
        from torchvision.models import vgg16

        super().__init__()
        path = Path(weights or vgg16_file())
        with torch.device("meta"):  # without its layers behind `features`, which are most of its weights
            network = vgg16(weights=None).features[: LPIPS_LAYERS[-1] + 1]
        self.network = network.to_empty(device="cpu")
        parts = {name.partition("features.")[2]: part for name, part in read_tensors(path)[0].items()}
        load_weights(self.network, {name: parts[name] for name in parts if name}, f"{path} (VGG16 weights)")
        official = file_sha256(path).startswith(vgg16_file().stem.rpartition("-")[2])  # the digits in its name
        self.notes = () if official else (f"{path} is not torchvision's file: its LPIPS compares to no other",)
        heads = load((resources.files("dic_repa.evaluation") / "weights" / "lpips_vgg.safetensors").read_bytes())
        self.heads = nn.ParameterList([nn.Parameter(heads[f"lin{k}.model.1.weight"]) for k in range(len(LPIPS_LAYERS))])
        # ImageNet's mean and deviation as LPIPS rounds them, for images in [-1, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.heads, self._features(a), self._features(b))
        return sum((F.conv2d((x - y).square(), head).mean(dim=(1, 2, 3)) for head, x, y in pairs), a.new_zeros(len(a)))

    def _features(self, images: Tensor) -> list[Tensor]:
        """Each layer's features, of length 1 at each place."""
        x, found = (images.float() * 2 - 1 - self.mean) / self.std, []
        for index, layer in enumerate(self.network):
            x = layer(x)
            if index in LPIPS_LAYERS:
                found.append(F.normalize(x, dim=1, eps=1e-10))
        return found


def vgg16_file() -> Path:
    """Where VGG16's weights are looked for; they are not fetched by themselves, since they are half a gigabyte."""
    from torchvision.models import VGG16_Weights

    return in_torch_hub(VGG16_Weights.IMAGENET1K_V1.url)


def where_to_get_vgg16() -> str:
    """What to fetch for LPIPS, and where to put it."""
    from torchvision.models import VGG16_Weights

    return f"fetch {VGG16_Weights.IMAGENET1K_V1.url} and put it at {vgg16_file()}"
