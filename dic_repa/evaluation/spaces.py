"""The feature spaces beside Inception that Fréchet distances are published in: networks of timm, each fed in one way.

What is fed and what is taken are those of FDr^6 (Yang et al., arXiv 2604.28190), which RAEv2 (arXiv 2605.18324) reports
too: images resized (bicubic, antialiased, not rounded) and normalised as timm says; of a ViT the class token behind the
final norm, of SigLIP 2 its attention pool, of ConvNeXt V2 the mean over the last map. They compute in bfloat16, this
does in float32. CLIP has the exact GELU there and here, though OpenAI trained it with the quick one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.evaluation.extractors import extractors, tensors_fingerprint


@dataclass(frozen=True)
class Space:
    """A network, the side of the images that it is fed, and the licence of its weights.

    validation: the published distance of ImageNet's 50,000 validation images to its training images, at 256 px.
    """

    title: str
    model: str  # timm's name, with that of the weights
    size: int
    licence: str
    validation: float


SPACES = {
    "convnext": Space("ConvNeXt", "convnextv2_base.fcmae_ft_in22k_in1k", 224, "CC BY-NC 4.0", 56.87),
    "dinov2-256": Space("DINOv2 (256)", "vit_large_patch14_dinov2.lvd142m", 256, "Apache-2.0", 14.19),
    "mae": Space("MAE", "vit_large_patch16_224.mae", 224, "CC BY-NC 4.0", 0.04),
    "siglip": Space("SigLIP", "vit_so400m_patch16_siglip_256.v2_webli", 224, "Apache-2.0", 0.60),
    "clip": Space("CLIP", "vit_large_patch14_clip_224.openai", 256, "MIT", 5.60),
}


class TimmFeatures(nn.Module):
    """`features` (D): one vector of an image by a network of timm, see above.

    Args:
        name: what messages call it.
        weights: a safetensors file or plain state dict of timm's or the authors' layout; by default the hub's.
        pretrained: False leaves the weights random.

    Raises:
        UserError: weights that cannot be fetched or do not fit.
    """

    layers = ("features",)
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, space: Space, weights: str | Path | None = None, pretrained: bool = True):
        from dic_repa.encoders.timm_network import build_network, sketch, takes  # timm takes seconds to import

        super().__init__()
        # Position embeddings fit any size, and a size that is no multiple of the patch is padded.
        options = {key: True for key in ("dynamic_img_size", "dynamic_img_pad") if takes(sketch(space.model), key)}
        how = f"--feature-weights {name}=FILE"
        self.model: Any = build_network(space.model, weights, pretrained, options, weights_option=how)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.model.pretrained_cfg[key]).view(-1, 1, 1), persistent=False)
        self.size, self.resizing = space.size, f"bicubic, antialiased, to {space.size}, not rounded"
        self.fingerprint = tensors_fingerprint(self.model.state_dict())
        self.made_of = {"model": space.model, "weights": str(weights or "timm's"), "licence": space.licence}
        free = "NC" not in space.licence
        self.notes = () if free else (f"the weights of {name} are not for commercial use ({space.licence})",)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = F.interpolate(images.float() / 255, (self.size, self.size), mode="bicubic", antialias=True)
        found = self.model.forward_features((images - self.mean) / self.std)
        if found.ndim == 4:  # a map (B, D, h, w)
            return {"features": found.mean(dim=(2, 3)).float()}
        pools = getattr(self.model, "attn_pool", None) is not None
        return {"features": (self.model.forward_head(found, pre_logits=True) if pools else found[:, 0]).float()}


for _name, _space in SPACES.items():
    _text = f"{_space.model} of timm at {_space.size} px, as FDr^6 has it ({_space.licence})"
    extractors.register(_name, description=_text)(partial(TimmFeatures, _name, _space))
